"""The audit reports before training what a recipe gives: metrics, disagreements, exploits, exit codes."""

import json
import re

import pytest

from grpo_core import audit
from tests.launch import flags, run

LINES = "Answer so: <think>\nthoughts\n</think>\n<answer>\nanswer\n</answer>"


def options(tiny_model, problems, **more):
    base = dict(
        model_name_or_path=tiny_model,
        dataset_name=problems,
        engine="torch",
        num_generations=4,
        max_prompt_length=120,
        max_completion_length=12,
        system_prompt="",
        reward_funcs=["tests.rewards_for_tests:digits"],
        audit_prompts=6,
    )
    return flags(**(base | more))


def outcome(capsys, *arguments, **more) -> tuple[int, str]:
    """Run an audit without samples in this process; return its exit code and its output."""
    code = 0
    try:
        audit.main(options(*arguments, audit_samples=False, **more))
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    return code, captured.out + "".join(line for line in captured.err.splitlines() if line.startswith("error"))


def data(folder, golds):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": "How many?", "solution": gold}) + "\n" for gold in golds))
    return str(path)


def column(output: str, reward: str) -> dict[str, str]:
    """{probe: its cell in the table's column `reward`}."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines()]
    (start,) = [i for i, cells in enumerate(lines) if cells[0] == "probe"]
    return {cells[0]: cells[lines[start].index(reward)] for cells in lines[start + 2 : start + 10]}


def test_a_reward_with_spread_passes_and_nothing_is_written(tiny_model, problems, tmp_path):
    argv = options(tiny_model, problems, output_dir=tmp_path / "out", push_to_hub=True, do_eval=True)
    code, output = run("grpo_core.audit", argv, tmp_path / "log")
    assert code == 0 and "Training would have a signal" in output, output
    assert "24 completions of " in output and "6 of 6 can be parsed" in output
    assert int(re.search(r"groups with spread +(\d) of 6", output)[1]) >= 1
    assert re.search(r"digits +0\.\d+ on average, 0 to ", output)
    assert re.search(r"- \d+% of the completions are cut before they end: raise max_completion_length", output)
    assert not (tmp_path / "out").exists()


def test_rewards_that_tell_nothing_apart_are_no_signal(tiny_model, problems, tmp_path):
    argv = options(tiny_model, problems, reward_funcs=["accuracy", "repetition_penalty"], repetition_max_penalty=0.0)
    code, output = run("grpo_core.audit", argv, tmp_path / "log")
    assert code == 1 and "NO SIGNAL" in output and "Traceback" not in output, output
    verdict = output.partition("NO SIGNAL")[2]
    assert "no group of 6 has rewards that differ" in verdict and "use easier data" in verdict
    assert re.search("repetition_penalty_reward gives -?0 to every completion", verdict)


def test_golds_that_cannot_be_parsed(tiny_model, tmp_path, capsys):
    code, output = outcome(capsys, tiny_model, data(tmp_path, ["Paris", "Rome"]), reward_funcs=["accuracy"])
    assert (
        code == 1 and "0 of 2 can be parsed; one that cannot: '" in output and "no gold answer can be parsed" in output
    )
    code, output = outcome(capsys, tiny_model, data(tmp_path, ["Paris", "63"]), reward_funcs=["accuracy"])
    assert code == 0 and "1 of 2 can be parsed; one that cannot: 'Paris'" in output
    code, output = outcome(capsys, tiny_model, data(tmp_path, ["Paris", "63"]), max_prompt_length=2)
    assert code == 1 and "no prompt fits into max_prompt_length 2" in output


def test_probes_of_the_built_in_rewards(tiny_model, problems, capsys):
    names = [
        "accuracy",
        "format",
        "tag_count",
        "reasoning_steps",
        "repetition_penalty",
        "length",
        "cosine",
        "soft_overlong_punishment",
    ]
    code, output = outcome(capsys, tiny_model, problems, reward_funcs=names, system_prompt=LINES)
    assert code == 0 and "never asks" not in output and "no value" not in output, output
    accuracy = column(output, "accuracy_reward")
    assert [accuracy.pop(probe) for probe in (audit.EMPTY, audit.HUGE)] == ["0", "0"]
    assert list(accuracy) == list(audit.NOTATIONS) and set(accuracy.values()) == {"1"}
    for name, paid in (("format_reward", "1"), ("tag_count_reward", "0")):  # the latter wants each tag on its own line
        values = column(output, name)
        assert [values[probe] for probe in (audit.TAGGED, audit.INLINE, audit.EMPTY)] == ["1", paid, "0"]
    advice = [line for line in output.splitlines() if line.startswith("- ")]
    assert len(advice) == 1 and "reasoning_steps_reward pays as much for huge repetition as for '" in advice[0]


@pytest.mark.parametrize(("system_prompt", "asks"), [("", "<think> and <answer>"), ("<think> first.", "<answer>")])
def test_a_prompt_that_does_not_ask_for_what_is_paid(tiny_model, problems, capsys, system_prompt, asks):
    silent = {"reward_funcs": ["accuracy", "format"], "system_prompt": system_prompt}
    output = outcome(capsys, tiny_model, problems, **silent)[1]
    assert f"format_reward pays for <think> and <answer>, but the prompt never asks for {asks}:" in output


@pytest.mark.parametrize("opened", ["<think>\n", "<think>\n\n</think>\n\n"])
def test_a_completion_goes_on_where_the_template_has_begun(tiny_model, problems, tmp_path, capsys, opened):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}" + opened + "{% endif %}"
    )
    _, output = outcome(
        capsys, tiny_model, problems, reward_funcs=["format"], system_prompt=LINES, chat_template=template
    )
    assert column(output, "format_reward")[audit.TAGGED] == "1", output


def test_rewards_of_the_user_may_fail(tiny_model, problems, tmp_path, capsys, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def first(completions, **kwargs):\n    return [float(c[0]['content'][0] == 'F') for c in completions]\n"
        "def broken(completions, **kwargs):\n    raise RuntimeError('no such service')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, output = outcome(capsys, tiny_model, problems, reward_funcs=["my_rewards:first"])
    assert code == 0 and "a probe failed: first failed with IndexError (IndexError: string" in output, output
    assert column(output, "first")[audit.EMPTY] == "-" and "first pays as much for huge repetition" in output
    code, output = outcome(capsys, tiny_model, problems, reward_funcs=["my_rewards:broken"])
    assert code == 1 and "broken gave no value to any probe" in output and "no such service" in output


@pytest.mark.parametrize(
    ("change", "says"),
    [({"audit_prompts": 0}, "at least 1"), ({"reward_weights": [1, 2]}, "reward_weights"), ({"audit": 1}, "audit")],
)
def test_bad_input_is_one_sentence(tiny_model, problems, capsys, change, says):
    code, output = outcome(capsys, tiny_model, problems, **change)
    assert code == 2 and output.splitlines()[-1].startswith("error: ") and says in output.splitlines()[-1]


def test_a_row_that_is_no_prompt_is_named_by_its_number_in_the_data(tiny_model, tmp_path, capsys):
    """It is not named by its position among the rows that the audit reads."""
    rows = [{"prompt": "" if i == 4 else "How many?", "solution": "3"} for i in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, said = outcome(capsys, tiny_model, tmp_path / "data.jsonl")
    assert code == 2 and "row 5 of the data" in said
