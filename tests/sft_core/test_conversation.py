"""No part of a row is dropped silently: fields of messages, columns for the template, roles, parts of a content.

The same rows go through the readers of both trainers.
"""

import json

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from gen.config import GenerateConfig
from gen.store import Store
from grpo_core.config import SYSTEM_PROMPT, GRPOConfig, GRPOScriptArguments
from grpo_core.rollout import load_prompts
from sft_core.data.conversation import prompt_ids
from sft_core.dataset import check_columns, supervised_example, supervised_examples
from sft_core.prepare import prepare
from sft_core.run import distributed
from sft_core.run.cli import parse
from sft_core.run.config import SFTConfig
from sft_core.train import OPTIONS
from tests.launch import flags, locks_released

USER, YES = {"role": "user", "content": "Ben has 4"}, {"role": "assistant", "content": "yes"}
MORE = {"role": "user", "content": "more"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALLS = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def template(body="{{ m.content }}", head="", roles="<|{{ m.role }}|>"):
    return (
        "{{ bos_token }}" + head + "{% for m in messages %}" + roles + body + "{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )


def supervised(tokenizer, row):
    """The text of a row in supervised training."""
    stop_ids = frozenset([tokenizer.eos_token_id])
    return tokenizer.decode(supervised_example(tokenizer, row, stop_ids, SFTConfig(output_dir="o"))[0])


def load(tokenizer, rows, **options):
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    arguments = GRPOScriptArguments(dataset_name="d", reward_funcs=["format"])
    return load_prompts(data, arguments, GRPOConfig(output_dir="o", **{"system_prompt": ""} | options), tokenizer)


def prompt(tokenizer, row, **options):
    """The text of a prompt in GRPO."""
    [found], _ = load(tokenizer, [row], **options)
    return tokenizer.decode(found.ids)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reasoning_content", "hm"),
        ("thinking", "hm"),
        ("name", "Ann"),
        ("weight", 0),
        ("weight", 1.0),
        ("train", False),
        ("tool_calls", CALLS),
        ("function_call", {"name": "add"}),
        ("audio", {"id": "7", "data": "x"}),
    ],
)
def test_a_field_of_a_message_shows_or_is_refused(tokenizer, name, value):
    """This holds for a field of any message, in both trainers; a missing field equals None."""
    shows = template(body="{{ m.content }}{{ m." + name + " | tojson if m." + name + " is defined }}")
    for turn in (0, 1):
        messages = [message | {name: value} if i == turn else message for i, message in enumerate([USER, YES])]
        readers = [(supervised, {"messages": messages}), (supervised, {"prompt": messages[:1], "completion": [YES]})]
        readers = readers[: 2 - turn] + [(prompt, {"prompt": [*messages, MORE]})]
        for read, row in readers:
            tokenizer.chat_template = shows
            read(tokenizer, row)
            tokenizer.chat_template = template()
            with pytest.raises(ValueError, match=f"leaves out `{name}` of message {turn + 1} \\(role"):
                read(tokenizer, row)
        for none in (None, "", [], {}):
            given = [message | {name: none, "tool_call_id": "1"} for message in (USER, YES)]
            assert supervised(tokenizer, {"messages": given}) == supervised(tokenizer, {"messages": [USER, YES]})
            assert prompt(tokenizer, {"prompt": given[:1]}) == prompt(tokenizer, {"prompt": [USER]})


def test_the_name_of_a_tool_that_answers_need_not_show(tokenizer):
    """Like `tool_call_id`, it only identifies the call that is answered."""
    tokenizer.chat_template = template()
    messages = [USER, {"role": "tool", "content": "3", "name": "add", "tool_call_id": "1"}]
    assert prompt(tokenizer, {"prompt": messages}).count("3") == 1


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_a_role_that_the_template_passes_over_is_refused(tokenizer, role):
    tokenizer.chat_template = template(body="{% if m.role in ['user', 'assistant'] %}{{ m.content }}{% endif %}")
    messages = [{"role": role, "content": "Answer in French."}, USER, YES]
    with pytest.raises(ValueError, match=f"leaves out `content` of message 1 \\(role {role}\\)"):
        supervised(tokenizer, {"messages": messages})
    with pytest.raises(ValueError, match=f"row 1 of the data: .* leaves out `content` of message 1 \\(role {role}\\)"):
        prompt(tokenizer, {"prompt": messages[:2]})


@pytest.mark.parametrize(
    ("column", "value", "names"),
    [
        ("tools", TOOLS, "tools"),
        ("tools", json.dumps(TOOLS), "tools"),
        ("documents", [{"title": "T", "text": "words"}], "documents"),
        ("chat_template_kwargs", {"enable_thinking": False}, "enable_thinking"),
        ("chat_template_kwargs", {"enable_thinking": True, "other": None}, "enable_thinking"),
        ("chat_template_kwargs", {"effort": "high"}, "effort"),
        ("chat_template_kwargs", 5, "chat_template_kwargs"),
        ("images", [{"path": "a.png"}], "images"),
        ("image", {"path": "a.png"}, "image"),
    ],
)
def test_a_column_for_the_template_reaches_it_or_is_refused(tokenizer, column, value, names):
    rows = [(supervised, {"messages": [USER, YES]}), (prompt, {"prompt": [USER]}), (prompt, {"prompt": "Ben has 4"})]
    shown = template(head="{{ " + names + " | tojson if " + names + " is defined }}<|user|>")
    for read, row in rows:
        tokenizer.chat_template = shown
        assert read(tokenizer, row | {column: value}) != read(tokenizer, row | {column: None})
        tokenizer.chat_template = template()
        with pytest.raises(ValueError, match=f"does not use `{names}` and would leave it out"):
            read(tokenizer, row | {column: value})
    for row in ({"text": "1+1"}, {"prompt": "1+1", "completion": "2"}):
        with pytest.raises(ValueError, match=f"plain text has no place for `{names}`"):
            supervised(tokenizer, row | {column: value})
        assert supervised(tokenizer, row | {column: None})


def test_an_option_of_the_generation_prompt_alone_is_no_unknown_one(tokenizer):
    """Qwen3 has such an option; this tests its default and its opposite."""
    no_thoughts = "add_generation_prompt and enable_thinking is defined and not enable_thinking"
    tokenizer.chat_template = template() + "{% if " + no_thoughts + " %}<think></think>{% endif %}"
    for value in (True, False):
        row = {"chat_template_kwargs": {"enable_thinking": value}}
        assert prompt(tokenizer, {"prompt": [USER]} | row).endswith("<think></think>") is not value
    assert supervised(tokenizer, {"messages": [USER, YES], "chat_template_kwargs": {"enable_thinking": True}})


@pytest.mark.parametrize("of_all", [{"effort": "low"}, {"effort": "low", "tools": ["of all"]}])
@pytest.mark.parametrize("of_row", [None, {"effort": None}, {"effort": "high"}])
def test_an_option_for_all_rows_and_one_of_the_row(tokenizer, of_all, of_row):
    """The row's option takes precedence, and so does a column of the row over the option for all rows."""
    tokenizer.chat_template = template(head="{{ effort }}{{ tools }}")
    shown = "high" if (of_row or {}).get("effort") else "low"
    row = {"chat_template_kwargs": of_row, "tools": TOOLS if "tools" in of_all else None}
    tools = str(TOOLS) if "tools" in of_all else ""
    found = prompt(tokenizer, {"prompt": [USER]} | row, chat_template_kwargs=of_all)
    config, stop_ids = SFTConfig(output_dir="o", chat_template_kwargs=of_all), frozenset([tokenizer.eos_token_id])
    ids, _ = supervised_example(tokenizer, {"messages": [USER, YES]} | row, stop_ids, config)
    for text in (found, tokenizer.decode(ids)):
        assert "".join(f"{shown}{tools}".split()) in "".join(text.split())
    arguments, grpo = GRPOScriptArguments(dataset_name="d"), GRPOConfig(output_dir="o", chat_template_kwargs=of_all)
    with pytest.raises(ValueError, match="row 1 of the data: plain text has no place for `effort`"):
        load_prompts(Dataset.from_list([{"prompt": "1+1"}]), arguments, grpo, tokenizer, as_given=True)
    for name in ("chat_template", "tokenize", "continue_final_message"):
        with pytest.raises(ValueError, match=f"may not hold {name}"):
            prompt(tokenizer, {"prompt": [USER]}, chat_template_kwargs={name: "x"})


def test_parts_of_text_are_one_text_and_others_are_refused(tokenizer):
    text = lambda *texts: [{"type": "text", "text": text, "image": None} for text in texts]  # noqa: E731
    for parts in (text("Ben has 4"), text("Ben has", " 4")):
        given = USER | {"content": parts}
        assert prompt(tokenizer, {"prompt": [given]}) == prompt(tokenizer, {"prompt": [USER]})
        assert supervised(tokenizer, {"messages": [given, YES]}) == supervised(tokenizer, {"messages": [USER, YES]})
    others = (
        [{"type": "image"}],
        [],
        ["x"],
        [*text("x"), {"type": "image_url", "image_url": {"url": "a"}}],
        [{"type": "text", "text": 5}],
        [{"type": "text", "text": "x", "annotations": [1]}],
    )
    for parts in others:
        for read, row in (
            (supervised, {"messages": [YES | {"content": parts}]}),
            (prompt, {"prompt": [USER | {"content": parts}]}),
        ):
            row = json.loads(json.dumps(row))
            with pytest.raises(ValueError, match="is not text but list: give every message one text"):
                read(tokenizer, row) if read is supervised else read_one(tokenizer, row)


def read_one(tokenizer, row):
    """A prompt with types that Arrow cannot represent."""
    from sft_core.data.conversation import prompt_of

    prompt_of(row["prompt"], "prompt")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (["What is 1+1?"], "`prompt` must hold messages with `role` and `content`; it holds 'What is 1\\+1\\?'"),
        ({"role": "user", "content": "x"}, "`prompt` must be text or a list of messages, and is {'role'"),
        (json.dumps([USER]), "`prompt` is a conversation written as text .*: make it a list of messages"),
        (str([USER]), "`prompt` is a conversation written as text"),
        (json.dumps(USER), "`prompt` is a conversation written as text"),
        (json.dumps([{"from": "human", "value": "x"}]), "`prompt` is a conversation written as text"),
        (21, "`prompt` must be text or a list of messages, and is 21"),
        (True, "`prompt` must be text or a list of messages, and is True"),
        ([], "`prompt` must be text or a list of messages, and is empty"),
        ("", "`prompt` must be text or a list of messages, and is empty"),
        (" \n", "`prompt` must be text or a list of messages, and is ' "),
        ([{"content": "x"}], "unknown role None in `prompt`"),
        ([{"from": "human", "value": "x"}], "unknown role None in `prompt`"),
        ([USER | {"content": None}], "a message of the user in `prompt` is not text but NoneType"),
        ([USER, YES], "`prompt` ends with an assistant message"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_row(tokenizer, value, says):
    with pytest.raises(ValueError, match=f"row 1 of the data: {says}"):
        prompt(tokenizer, {"prompt": value})
    if isinstance(value, str) and value.strip():  # supervised training and gen.generate refuse it, too
        with pytest.raises(ValueError, match=says):
            supervised(tokenizer, {"prompt": value, "completion": "2"})
        rows = Dataset.from_list([{"prompt": value}])
        [found] = Store(GenerateConfig(hf_dataset="d", model="m"), rows).render(rows.data.table)
        assert isinstance(found, str) and "is a conversation written as text" in found  # it goes to failed.jsonl


def test_the_number_is_that_of_the_row_and_later_rows_are_looked_at_too(tokenizer):
    hidden = {"messages": [USER, YES | {"reasoning_content": "hm"}]}
    rows = Dataset.from_list([{"messages": [USER, YES]}] * 40 + [hidden])  # the others have the field too, and None
    with pytest.raises(ValueError, match="row 41 of the data: the chat template leaves out `reasoning_content`"):
        supervised_examples(rows, tokenizer, frozenset([tokenizer.eos_token_id]), SFTConfig(output_dir="o"))
    prompts = [{"prompt": [*row["messages"], MORE], "tools": None} for row in rows]
    assert load(tokenizer, prompts[:40])[0][0].messages == [USER, YES, MORE]
    with pytest.raises(ValueError, match="row 41 of the data: the chat template leaves out `reasoning_content`"):
        load(tokenizer, prompts)


def test_columns_that_are_not_used_are_named(tokenizer):
    config = SFTConfig(output_dir="o", dataset_text_field="story")
    assert check_columns(["id", "messages", "tools", "system", "prompt"], config) == ["id", "system", "prompt"]
    assert check_columns(["prompt", "completion", "story"], config) == ["story"]
    assert check_columns(["story"], config) == []


GEMMA = template(
    head="{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)
SILENT = template(head="{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}")


@pytest.mark.parametrize("body", [GEMMA, SILENT])
def test_templates_without_a_system_role(tokenizer, body):
    """Our system prompt is put before the user's message. A system message in the data is refused, with a remedy."""
    tokenizer.chat_template = body
    for value in ("Ben has 4", [USER]):
        [found], said = load(tokenizer, [{"prompt": value}], system_prompt=None, max_prompt_length=4000)
        assert found.messages == [{"role": "user", "content": f"{SYSTEM_PROMPT}\n\nBen has 4"}]
        assert SYSTEM_PROMPT[:40] in tokenizer.decode(found.ids) and "the template has no system role" in said
    with pytest.raises(
        ValueError, match="has no system role and would drop --system_prompt: .* give --system_prompt ''"
    ):
        prompt(tokenizer, {"prompt": "Ben has 4"}, system_prompt="Add.")
    assert "Ben has 4" in prompt(tokenizer, {"prompt": "Ben has 4"})
    with pytest.raises(ValueError, match="row 1 of the data: the chat template (refuses|leaves out `content`)"):
        prompt(tokenizer, {"prompt": [{"role": "system", "content": "Add."}, USER]})
    with pytest.raises(ValueError, match="^the chat template (refuses|leaves out `content`)"):
        prompt_ids(tokenizer, [{"role": "system", "content": "Add."}, USER])  # of an evaluation and gen.generate
    assert prompt_ids(tokenizer, [USER])


def test_prompts_too_long_only_because_of_the_system_prompt_are_said_so(tokenizer):
    rows = [{"prompt": "Ben has 4"}, {"prompt": "Ben has 4 " * 99}, {"prompt": "4"}]
    system = {"system_prompt": "Think. " * 20}
    with pytest.raises(ValueError, match="all 3 prompts .* 60: raise it, or give --system_prompt '', with which 2 fit"):
        load(tokenizer, rows, max_prompt_length=60, **system)
    own = {"prompt": [{"role": "system", "content": "Add."}, USER]}  # from the data, so it is not ours
    prompts, said = load(tokenizer, [{"prompt": row["prompt"]} for row in rows], max_prompt_length=60)
    assert len(prompts) == 2 and said == "1 longer than 60 tokens"
    prompts, said = load(tokenizer, [own, {"prompt": [USER]}], max_prompt_length=60, **system)
    assert [p.messages for p in prompts] == [own["prompt"]] and "1 longer than 60 tokens (1 of them only with" in said


def test_what_is_not_used_or_left_out_is_said_before_the_run(tiny_model, tmp_path):
    row = {"messages": [USER, YES], "system": "Add.", "id": 7}
    for name, count in (("train", 3), ("test", 1)):
        rows = [row] * count + [row | {"messages": [USER | {"content": "Ben has 4 " * 50}, YES]}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"dataset_name": tmp_path / "train.jsonl", "dataset_test_split": tmp_path / "test.jsonl"}
    more = {"do_eval": "true", "max_length": 40, "truncation_mode": "drop", "max_steps": 1, "report_to": ["none"]}
    said = []
    for name, streams in (("whole", "false"), ("streamed", "true")):
        more |= {"output_dir": tmp_path / name, "dataset_streaming": streams}
        with locks_released():
            said.append(prepare(*parse(OPTIONS, flags(model_name_or_path=tiny_model, **files, **more))).summary)
        distributed.shutdown()
    counts = "0 cut, 1 too long, 0 without trained tokens"
    assert f"3 rows to train on; {counts}; columns not used: system, id; 1 rows to evaluate on; {counts}" in said[0]
    assert "rows are streamed in the order of their files; columns not used: system, id; 1 rows to evaluate" in said[1]
