"""Formats of rows, their trained tokens, chat templates, truncation, and tokenising only once."""

import json

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from sft_core.data import chat_template as chat
from sft_core.dataset import CUT, KEPT, NOTHING, TOO_LONG, fit, supervised_example, supervised_examples
from sft_core.run.config import SFTConfig

TURNS = [("user", "Ben has 4"), ("assistant", "yes"), ("user", "more"), ("assistant", "no")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
PLAIN = (  # the tokenizer's template without its markers
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def options(**more):
    return SFTConfig(output_dir="o", **more)


def trained(tokenizer, row, **more):
    ids, mask = supervised_example(tokenizer, row, frozenset([tokenizer.eos_token_id]), options(**more))
    assert len(ids) == len(mask)
    return tokenizer.decode(ids), tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])


@pytest.mark.parametrize("template", [None, PLAIN])
def test_only_the_assistant_is_trained_its_end_of_turn_included(tokenizer, template):
    """Markers, and comparing renderings without markers, give the same result."""
    assert chat.has_markers(tokenizer)
    tokenizer.chat_template = template or tokenizer.chat_template
    whole, learnt = trained(tokenizer, {"messages": MESSAGES})
    assert learnt == "yes<|end|>no<|end|>"
    assert whole == tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    everything, learnt = trained(tokenizer, {"messages": MESSAGES}, assistant_only_loss=False)
    assert everything == learnt == whole
    row = {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]}
    whole, learnt = trained(tokenizer, row)
    assert learnt == "no<|end|>"  # with prompt and completion, only the completion is trained
    assert trained(tokenizer, row, completion_only_loss=False) == (whole, "yes<|end|>no<|end|>")
    assert trained(tokenizer, row, assistant_only_loss=False) == (whole, "no<|end|>")
    assert trained(tokenizer, {"messages": MESSAGES[:1]})[1] == ""


def test_text_begins_and_ends_as_the_model_knows_it(tokenizer):
    assert trained(tokenizer, {"prompt": "1+1=", "completion": "2"}) == ("1+1=2<|end|>", "2<|end|>")
    row = {"prompt": "1+1=", "completion": "2<|end|>"}
    assert trained(tokenizer, row, completion_only_loss=False) == ("1+1=2<|end|>", "1+1=2<|end|>")
    assert trained(tokenizer, {"story": "1+1=2"}, dataset_text_field="story") == ("1+1=2<|end|>", "1+1=2<|end|>")
    from tokenizers.processors import TemplateProcessing

    special = [("<|bos|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=special)
    assert trained(tokenizer, {"text": "1+1=2"})[0] == "<|bos|>1+1=2<|end|>"  # one BOS if the tokenizer has one
    assert trained(tokenizer, {"prompt": "1+1=", "completion": "2"}) == ("<|bos|>1+1=2<|end|>", "2<|end|>")
    assert trained(tokenizer, {"text": "<|bos|>1+1=2"})[0] == "<|bos|>1+1=2<|end|>"  # it is already rendered
    assert trained(tokenizer, {"messages": MESSAGES})[0].count("<|bos|>") == 1
    tokenizer.chat_template = None
    chat.set_up(tokenizer, None, conversations=True, chatml_default=True)
    assert trained(tokenizer, {"messages": MESSAGES[:2]})[0].startswith("<|bos|><|im_start|>")
    assert "OK (one <|bos|>" in chat.check_template(tokenizer, {tokenizer.eos_token_id}, supervised=True)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token, so the model would never learn to stop: give --eos_token"):
        trained(tokenizer, {"text": "1+1=2"})


def test_the_end_of_turn_is_trained_even_where_it_is_the_padding_or_outside_the_markers(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    assert trained(tokenizer, {"messages": MESSAGES})[1] == "yes<|end|>no<|end|>"
    inside, outside = "+ eos_token }}{% endgeneration %}", "}}{% endgeneration %}{{ eos_token }}"
    assert inside in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(inside, outside)
    assert trained(tokenizer, {"messages": MESSAGES})[1] == "yes<|end|>no<|end|>"


def test_tools_reach_the_template(tokenizer):
    plain = tokenizer.chat_template
    calls = "{% for c in m['tool_calls'] or [] %}{{ c['function'] | tojson }}{% endfor %}"
    tokenizer.chat_template = "{% if tools is not none %}{{ tools | tojson }}{% endif %}" + PLAIN.replace(
        "{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}",
        "{{ '<|' + m['role'] + '|>' + m['content'] }}" + calls + "{{ eos_token }}",
    )
    # As Arrow returns them: every row has the fields of all rows.
    tools = [{"function": {"name": "add", "parameters": {"a": "int", "city": None}}, "type": None}]
    shown = '[{"function": {"name": "add", "parameters": {"a": "int"}}}]<|bos|>'
    for given in (tools, json.dumps(tools)):
        assert trained(tokenizer, {"messages": MESSAGES[:2], "tools": given})[0].startswith(shown)
    for none in (None, [], "", "[]"):
        assert trained(tokenizer, {"messages": MESSAGES[:2], "tools": none})[0].startswith("<|bos|>")
    call = {"function": {"name": "add", "arguments": {"a": 1, "city": None}}}
    called = {"role": "assistant", "content": None, "tool_calls": [call], "name": None}
    row = {"messages": [MESSAGES[0], called], "tools": tools}
    assert trained(tokenizer, row)[1] == '{"name": "add", "arguments": {"a": 1}}<|end|>'
    with pytest.raises(ValueError, match="`tools` must be a list, or a list as JSON text"):
        trained(tokenizer, row | {"tools": "add"})
    tokenizer.chat_template = plain
    with pytest.raises(ValueError, match="does not use `tools` and would leave it out"):
        trained(tokenizer, row)
    with pytest.raises(ValueError, match="leaves out `tool_calls` of message 2"):
        trained(tokenizer, row | {"tools": None})


def turns(
    heading="<|assistant|>", words="{{ m.content }}<|end|>", prompt="<|assistant|>", rest="", user="{{ m.content }}"
):
    return (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        + heading
        + words
        + "{% else %}<|user|>"
        + user
        + "<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + prompt
        + "{% endif %}"
        + rest
    )


# What the templates of well-known model families do to the assistant's text.
AFTER_THOUGHT = "{% set words = m.content.split('</think>')[-1] %}"
THOUGHT = "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
QWEN3 = turns(
    words=AFTER_THOUGHT + THOUGHT + "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ words }}<|end|>\n"
)
LLAMA3 = turns(heading="<|assistant|>\n\n", words="{{ m.content | trim }}<|end|>", prompt="<|assistant|>\n\n")
MISTRAL = turns(heading="", words=" {{ m.content | trim }}<|end|>", prompt="")
PHI3 = turns(rest="{% if not add_generation_prompt %}<|pad|>{% endif %}")
R1_FIRST = turns(words=AFTER_THOUGHT + "{{ words }}<|end|>")
R1_NOW = turns(words=AFTER_THOUGHT + "{{ words }}<|end|>", prompt="<|assistant|><think>\n")
THINKING = [MESSAGES[0], {"role": "assistant", "content": "<think>hm</think>yes"}, *MESSAGES[2:]]


@pytest.mark.parametrize(
    ("template", "messages", "learnt"),
    [
        (QWEN3, MESSAGES, "yes<|end|><think>\n\n</think>\n\nno<|end|>"),
        (QWEN3, THINKING[:2], "<think>\nhm\n</think>\n\nyes<|end|>"),
        (LLAMA3, [MESSAGES[0], {"role": "assistant", "content": " yes\n"}], "yes<|end|>"),
        (MISTRAL, MESSAGES, " yes<|end|> no<|end|>"),
        (PHI3, MESSAGES, "yes<|end|>no<|end|>"),
        (R1_FIRST, MESSAGES, "yes<|end|>no<|end|>"),
        (turns(), [MESSAGES[0], {"role": "assistant", "content": "a <|end|> b"}], "a <|end|> b<|end|>"),
        (turns(), [MESSAGES[0], {"role": "assistant", "content": ""}], "<|end|>"),
    ],
)
def test_templates_of_well_known_families(tokenizer, template, messages, learnt):
    tokenizer.chat_template = template
    whole, found = trained(tokenizer, {"messages": messages})
    assert found == learnt and whole == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        (QWEN3, THINKING, "leaves out a part of the assistant's message \\('hm'\\)"),
        (R1_FIRST, THINKING[:2], "leaves out a part of the assistant's message \\('hm'\\)"),
        (R1_NOW, MESSAGES[:2], "a finished turn does not begin with the generation prompt"),
        (turns(), MESSAGES[1:], "begins with the assistant"),
    ],
)
def test_words_that_a_template_leaves_out_are_not_missed_in_silence(tokenizer, template, messages, says):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=says):
        trained(tokenizer, {"messages": messages})


def test_only_what_is_trained_has_to_be_told_apart(tokenizer):
    tokenizer.chat_template = QWEN3
    row = {"prompt": THINKING[:3], "completion": THINKING[3:]}
    assert trained(tokenizer, row)[1] == "<think>\n\n</think>\n\nno<|end|>"


def test_text_is_tokenised_in_one_piece(tiny_model):
    """A tokenizer that marks the beginnings of words adds no mark between the parts of a row."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["?", "<s>", "</s>", "[U]", "▁hi", "▁yes", "▁", "yes", "▁more", "▁no"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="?")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[U]"]})
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[U] {{ m.content }}"
        "{% else %}OPEN {{ m.content }}</s>CLOSE{% endif %}{% endfor %}"
    )
    words = ["hi", "yes", "more", "no"]
    messages = [{"role": turn["role"], "content": word} for turn, word in zip(MESSAGES, words, strict=True)]
    found = []
    for marks in (("", ""), ("{% generation %}", "{% endgeneration %}")):
        tokenizer.chat_template = template.replace("OPEN", marks[0]).replace("CLOSE", marks[1])
        found.append(supervised_example(tokenizer, {"messages": messages}, frozenset([2]), options()))
    assert found[0] == found[1]
    ids, mask = found[0]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[U]", "▁hi", "▁yes", "</s>", "[U]", "▁more", "▁no", "</s>"]
    assert mask == [False, False, True, True] * 2


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{% for m in messages %}{{ loop.length }}{{ m['content'] + eos_token }}{% endfor %}",
            "rendered differently once later",
        ),
        ("{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}", "cannot be separated from"),
        (PLAIN.replace("+ eos_token", ""), "does not end the assistant's turn with a stop token"),
        (PLAIN + "{% generation %}{% endgeneration %}", "marks 0 of 2 assistant turns"),
        (
            "{{ raise_exception('only users') }}",
            "refuses a conversation of the roles user, assistant, user, assistant: only",
        ),
        (None, "start from an instruct model, or give one with --chat_template"),
    ],
)
def test_templates_that_hide_what_is_trained_are_refused(tokenizer, template, says):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=says):
        trained(tokenizer, {"messages": MESSAGES})


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": []}, "`messages` must be a list of messages, and is empty"),
        ({"messages": "hello"}, "must be a list of messages"),
        ({"messages": ["hello"]}, "must hold messages with `role` and `content`"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "unknown role 'bot' in `messages`: a message needs"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "is not text but list"),
        ({"messages": [{"role": "user", "content": None}]}, "a message of the user in `messages` is not text but None"),
        ({"prompt": "x", "completion": None}, "`completion` must be text and is NoneType"),
        ({"text": 3}, "`text` must be text and is int"),
    ],
)
def test_rows_that_are_not_as_their_form_says(tokenizer, row, says):
    with pytest.raises(ValueError, match=says):
        trained(tokenizer, row)


def test_truncation_is_a_choice(tokenizer):
    example = (list(range(10)), [False] * 5 + [True] * 5)
    assert fit(example, options(max_length=10)) == (example, KEPT)
    assert fit(example, options(max_length=7)) == ((list(range(7)), [False] * 5 + [True] * 2), CUT)
    assert fit(example, options(max_length=4))[1] == NOTHING
    kept = fit(example, options(max_length=7, truncation_mode="keep_end"))
    assert kept == ((list(range(3, 10)), [False] * 2 + [True] * 5), CUT)
    assert fit(example, options(max_length=7, truncation_mode="drop")) == (([], []), TOO_LONG)
    assert fit(([1, 2], [True, False]), options())[1] == NOTHING  # the first token is never predicted


def test_rows_are_tokenised_once_and_what_is_left_out_is_counted(tokenizer, tmp_path, monkeypatch):
    rows = [{"messages": MESSAGES[:2]}, {"messages": MESSAGES[:1]}, {"messages": [*MESSAGES[:3], *MESSAGES[3:] * 9]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 5))
    data = Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
    stop_ids = frozenset([tokenizer.eos_token_id])
    config = options(max_length=20, truncation_mode="drop")
    examples = supervised_examples(data, tokenizer, stop_ids, config)
    assert len(examples.rows) == 5 and examples.counts == {"cut": 0, "too long": 5, "without trained tokens": 5}
    assert tokenizer.decode(examples.rows[0]["input_ids"]) == tokenizer.apply_chat_template(
        MESSAGES[:2], tokenize=False
    )
    calls = []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: calls.append(a) or render(*a, **k))
    again = supervised_examples(data, tokenizer, stop_ids, config)
    assert not calls and again.rows[0]["input_ids"].tolist() == examples.rows[0]["input_ids"].tolist()
    parallel = supervised_examples(data, tokenizer, stop_ids, options(max_length=21, dataset_num_proc=2))
    assert parallel.lengths[0] == examples.lengths[0] == len(examples.rows[0]["input_ids"])
    for change in ({"chat_template": tokenizer.chat_template + " "}, {"bos_token": "<|user|>"}):
        for name, value in change.items():
            setattr(tokenizer, name, value)
        calls.clear()
        supervised_examples(data, tokenizer, stop_ids, config)
        assert calls, change  # another template or token, another result
    with pytest.raises(ValueError, match="none of the 15 rows has a trained token within max_length 2"):
        supervised_examples(data, tokenizer, stop_ids, options(max_length=2))


def test_chat_templates_are_checked_and_end_of_turn_is_eos(tokenizer):
    def check(tokenizer, stop_ids=None, supervised=False):
        return chat.check_template(tokenizer, stop_ids or {tokenizer.eos_token_id}, supervised)

    well = check(tokenizer)
    assert "OK (one <|bos|>; turns end with <|end|>" in well and "<think> left to the model" in well
    assert "<|end|>, which is not a stop token: give it as --eos_token" in check(tokenizer, {3})
    original = tokenizer.chat_template
    tokenizer.chat_template = "{{ bos_token }}" + original
    assert "begins with <|bos|> twice" in check(tokenizer)
    tokenizer.chat_template = original.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
    assert "<think> opened by the template" in check(tokenizer)
    tokenizer.chat_template = R1_NOW
    assert "<think> opened by the template" in check(tokenizer)
    assert "a finished turn does not begin with the generation prompt" in check(tokenizer, supervised=True)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + original
    assert "today's date" in check(tokenizer)
    tokenizer.chat_template = original.replace("eos_token", "'.'")
    assert "does not end with a special token" in check(tokenizer)
    tokenizer.chat_template, tokenizer.eos_token = original.replace("eos_token", "'<|end|>'"), "<|pad|>"
    chat.set_up(tokenizer, None, conversations=True, chatml_default=True)  # the template's own end of turn
    assert tokenizer.eos_token == "<|end|>" and "template: OK" in check(tokenizer)
    chat.set_up(tokenizer, "<|user|>", conversations=True, chatml_default=True)
    assert tokenizer.eos_token == "<|user|>"
    with pytest.raises(ValueError, match="eos_token 'nothing' is not in the tokenizer's vocabulary"):
        chat.set_up(tokenizer, "nothing", conversations=True, chatml_default=True)


def test_base_models_get_chatml(tokenizer):
    tokenizer.chat_template, size, end = None, len(tokenizer), tokenizer.eos_token
    chat.set_up(tokenizer, None, conversations=False, chatml_default=True)
    assert tokenizer.chat_template is None and tokenizer.eos_token == end  # plain text needs none
    chat.set_up(tokenizer, None, conversations=True, chatml_default=True)
    assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == ("<|im_end|>", "<|pad|>", size + 2)
    whole, learnt = trained(tokenizer, {"messages": MESSAGES[:2]})
    assert whole == "<|im_start|>user\nBen has 4<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert learnt == "yes<|im_end|>"


def test_marks_end_after_all_tokens_of_a_character(tokenizer):
    """A character with several tokens is trained up to its last token."""
    messages = [MESSAGES[0], {"role": "assistant", "content": "yes 🙂"}]
    inside = tokenizer.chat_template
    outside = inside.replace("+ eos_token }}{% endgeneration %}", "}}{% endgeneration %}{{ eos_token }}")
    for template in (inside, outside, PLAIN):
        tokenizer.chat_template = template
        assert trained(tokenizer, {"messages": messages})[1] == "yes 🙂<|end|>"
