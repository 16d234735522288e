"""The runner from the command line: results, reproducibility, kills, several processes, bad input."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from eval.run import main
from tests import launch
from tests.eval.helpers import killed_after_a_file, refused, samples, stones, times, write

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "rows.jsonl", stones([str(i) for i in range(20)]))


def arguments(model: str, data: Path, output: Path, **options) -> list[str]:
    options = {"tasks": "aime24", "engine": "torch", "max_new_tokens": 24, "num_samples": 2, "batch_size": 8} | options
    dataset = [f"{task}={data}" for task in ("aime24", "gsm8k")]
    return ["--model", model, "--output_dir", str(output), "--dataset", *dataset, *launch.flags(**options)]


def evaluate(tmp_path: Path, *args, **options) -> tuple[dict, list[dict]]:
    """Run eval.run; return its results and its rows of aime24."""
    output = args[2]
    code, log = launch.run("eval.run", arguments(*args, **options), tmp_path / "log.txt")
    assert code == 0, log
    return json.loads((output / "results.json").read_text()), samples(output)


def test_scores_are_of_the_models_answers(tiny_model, data, tmp_path):
    """The golds of every second problem are set to the model's answers, so that half of them are right."""
    greedy = {"temperature": 0, "num_samples": 1}
    content, rows = evaluate(tmp_path, tiny_model, data, tmp_path / "a", **greedy)
    assert [row["problem"] for row in rows] == list(range(20)) and content["results"]["aime24"]["pass@1"] == 0
    unparsed = [row["extracted"] == "" for row in rows]
    assert content["results"]["aime24"]["unparsed"] == sum(unparsed) / 20 < 1
    answered = [row for row in rows if row["extracted"] and row["extracted"].isdecimal()]
    right = {row["problem"]: row["extracted"] for row in answered[::2]}
    assert right
    other = write(tmp_path / "other.jsonl", stones([right.get(i, "123456") for i in range(20)]))
    content, again = evaluate(tmp_path, tiny_model, other, tmp_path / "b", **greedy)
    assert [row["completion"] for row in again] == [row["completion"] for row in rows]
    assert {row["problem"] for row in again if row["score"] == 1.0} == set(right)
    result = content["results"]["aime24"]
    assert result["pass@1"] == len(right) / 20 and result["pass@1_ci95_low"] < result["pass@1"]
    assert result["mean_length"] == sum(row["length"] for row in rows) / 20
    assert {"torch", "math-verify"} <= set(content["versions"]) and content["config"]["aime24"]["temperature"] == 0


@pytest.mark.slow
def test_seeds_and_processes(tiny_model, data, tmp_path):
    one, rows = evaluate(tmp_path, tiny_model, data, tmp_path / "one")
    two, parallel = evaluate(tmp_path, tiny_model, data, tmp_path / "two", data_parallel_size=2)
    assert parallel == rows and two["results"] == one["results"]
    assert rows[0]["completion"] != rows[1]["completion"] and len(rows) == 40
    _, other = evaluate(tmp_path, tiny_model, data, tmp_path / "three", seed=1)
    assert [row["completion"] for row in other] != [row["completion"] for row in rows]


def test_killed_and_continued(tiny_model, data, tmp_path):
    expected, rows = evaluate(tmp_path, tiny_model, data, tmp_path / "whole", max_new_tokens=100)
    output = tmp_path / "killed"
    argv, files = arguments(tiny_model, data, output, max_new_tokens=100), "details/aime24/*.parquet"
    done = killed_after_a_file("eval.run", argv, output, files, tmp_path / "log.txt")
    assert 1 <= len(done) < 5 and not (output / "results.json").exists()
    content, again = evaluate(tmp_path, tiny_model, data, output, max_new_tokens=100)
    assert again == rows and content["results"] == expected["results"]
    assert done.items() <= times(output, files).items()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or torch.cuda.is_available(), reason="needs vLLM's CPU build"
)
def test_vllm_repeats_a_missing_batch_and_splits_a_model(tiny_model, data, tmp_path):
    command = [sys.executable, "-m", "eval.run", *arguments(tiny_model, data, tmp_path / "out", engine="vllm")]
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "8"}  # as if a trainer's rank started it
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    rows = samples(tmp_path / "out")
    (tmp_path / "out" / "details" / "aime24" / "00008.parquet").unlink()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert samples(tmp_path / "out") == rows and len(rows) == 40
    greedy = {"engine": "vllm", "temperature": 0, "num_samples": 1, "limit": 6}
    for width in (1, 2):  # the model in one process, or split over two
        width_options = greedy | {"tensor_parallel_size": width, "data_parallel_size": 1}
        argv = arguments(tiny_model, data, tmp_path / str(width), **width_options)
        subprocess.run([sys.executable, "-m", "eval.run", *argv], cwd=ROOT, check=True, capture_output=True)
    assert samples(tmp_path / "1") == samples(tmp_path / "2") != []


def test_a_folder_holds_one_setting_and_several_tasks(tiny_model, data, tmp_path):
    evaluate(tmp_path, tiny_model, data, tmp_path / "out", limit=2)
    code, log = launch.run(
        "eval.run", arguments(tiny_model, data, tmp_path / "out", limit=2, seed=7), tmp_path / "log.txt"
    )
    assert code == 2 and "seed (0, now 7)" in log and "--output_dir" in log
    gsm = write(tmp_path / "gsm.jsonl", [{"question": "2 and 3?", "answer": "so 5 #### 5"}])
    content, _ = evaluate(tmp_path, tiny_model, gsm, tmp_path / "out", limit=2, tasks="gsm8k")
    assert set(content["results"]) == {"aime24", "gsm8k"} and content["results"]["gsm8k"]["problems"] == 1


@pytest.mark.parametrize(
    "options, says",
    [
        ({"tasks": "math_501"}, "did you mean math_500?"),
        ({"tasks": "custom|aime24|5|0"}, "examples in the prompt"),
        ({"tasks": "math_500", "dataset": "math_500={data}"}, "no column 'solution'"),
        ({"dataset": "aime24=/nowhere.jsonl"}, "no data file at /nowhere.jsonl: check --dataset"),
        ({"model": "/no/such/folder"}, "no model folder at /no/such/folder"),
        ({"max_new_tokens": 250}, "--fit_context"),
        ({"temperature": 0}, "--num_samples (or"),
        ({"engine": "vlm"}, "vllm, torch"),
        ({"nun_samples": 3}, "did you mean `num_samples`?"),
        ({"custom_tasks": "/nowhere.py"}, "check --custom_tasks"),
    ],
)
def test_bad_input(options, says, tiny_model, data, tmp_path, capfd):
    options = {name: str(value).format(data=data) for name, value in options.items()}
    model = options.pop("model", tiny_model)
    refused(main, arguments(model, data, tmp_path / "out", **options), capfd, says)
    assert not (tmp_path / "out").exists()


TASK = """
from eval.tasks import Doc, LightevalTaskConfig
class Mine:
    def compute(self, doc, predictions):
        return {score}
def ask(line, task_name=None):
    return Doc(query={query}, choices={choices})
TASKS_TABLE = [LightevalTaskConfig({name!r}, ask, {data!r}, metric={metric}, stop_sequence={stop})]
"""


def custom_task(path: Path, data: Path, **changes) -> dict:
    """Write a file with one task; return the options that run it."""
    form = {"score": "0.25", "choices": "[line['answer']]", "name": "mine", "metric": "[Mine()]", "stop": "[]"}
    form |= {"query": "line['problem']", "data": str(data)} | changes
    path.write_text(TASK.format(**form))
    return {"tasks": form["name"], "custom_tasks": path, "limit": 6, "num_samples": 1, "batch_size": 3}


def test_another_metric_judges_the_answers_again(tiny_model, data, tmp_path):
    """A damaged file is sampled again, with the same answers."""
    folder, scores, completions = tmp_path / "out", [], []
    for number, score in enumerate(("0.25", "float(len(predictions[0]) % 2)", "[][0]")):
        options = custom_task(tmp_path / f"task{number}.py", data, score=score)
        code, log = launch.run("eval.run", arguments(tiny_model, data, folder, **options), tmp_path / f"log{number}")
        rows = samples(folder, "mine")
        scores.append([row["score"] for row in rows])
        completions.append([row["completion"] for row in rows])
        assert (code, "checked again" in log) == ((0, False), (0, True), (1, True))[number], log
    assert scores == [[0.25] * 6, [float(len(text) % 2) for text in completions[0]], [None] * 6]
    assert (
        "6 samples are unscored and count as wrong: exception: IndexError" in log
        and "no answer could be checked" in log
    )
    assert completions[0] == completions[1] == completions[2]

    file = folder / "details" / "mine" / "00003.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    (folder / "details" / "mine" / "00000.parquet").write_bytes(whole)  # in place of another file
    code, log = launch.run("eval.run", arguments(tiny_model, data, folder, **options), tmp_path / "log")
    assert log.count("is damaged") == 2 and file.read_bytes() == whole
    (folder / "details" / "mine" / "settings.json").unlink()
    code, log = launch.run("eval.run", arguments(tiny_model, data, folder, **options), tmp_path / "log2")
    assert code == 2 and "cannot be read" in log and "Traceback" not in log


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"metric": "[]"}, "a list whose first entry has compute"),
        ({"metric": "[type('M', (), {'compute': lambda *_: 1.0})()]"}, "must pickle"),
        ({"name": "../out"}, "its name may contain only letters"),
        ({"choices": "[]"}, "fails on row 1"),
        ({"choices": "[None]"}, "has no problem or no right answer"),
        ({"choices": "line['answer'] +"}, "SyntaxError"),
    ],
)
def test_bad_custom_tasks(changes, says, tiny_model, data, tmp_path, capfd):
    name = f"bad_{abs(hash(says)) % 10**9}"
    options = custom_task(tmp_path / f"{name}.py", data, **changes)
    refused(main, arguments(tiny_model, data, tmp_path / "out", **options), capfd, says)


def test_right_answers_that_the_metric_cannot_read(tiny_model, tmp_path):
    rows = [{"problem": f"What is {i}?", "answer": answer} for i, answer in enumerate(["7", "seven", "9", "a fox"])]
    data = write(tmp_path / "rows.jsonl", rows)
    options = {"num_samples": 1, "max_new_tokens": 4}
    code, log = launch.run("eval.run", arguments(tiny_model, data, tmp_path / "a", **options), tmp_path / "log")
    assert code == 0 and "2 of 4 right answers (the first of problem 1) contain nothing" in log
    for bad, says in (("a fox", "4 of 4 right answers"), (None, "row 1 of")):
        write(data, [row | {"answer": bad} for row in rows])
        code, log = launch.run("eval.run", arguments(tiny_model, data, tmp_path / "b", **options), tmp_path / f"{bad}")
        assert code == 2 and says in log and "Traceback" not in log, log


def test_short_context_and_custom_tasks(tiny_model, data, tmp_path):
    changes = {"name": "short", "score": "float(len(predictions[0]) < int(doc.choices[0]))", "choices": "['100000']"}
    changes |= {"query": "line['problem'] + ' Well?' * int(line['answer'])", "stop": "['e']"}
    options = custom_task(tmp_path / "short_task.py", data, **changes) | {"limit": 3, "num_samples": 2}
    argv = arguments(tiny_model, data, tmp_path / "out", max_new_tokens=1000, fit_context=True, **options)
    code, log = launch.run("eval.run", argv, tmp_path / "log.txt")
    assert code == 0 and "which may cut answers off" in log, log
    result = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["short"]
    assert result["pass@1"] == 1.0 and result["samples"] == 6 and 24 < result["mean_length"] < 256
    rows = samples(tmp_path / "out", "short")
    assert not any("e" in row["completion"] for row in rows)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = [len(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]) for row in rows]
    cut = [(prompt, row["length"]) for prompt, row in zip(prompts, rows, strict=True) if row["finish_reason"] != "stop"]
    assert {prompt + length for prompt, length in cut} == {256} and len({length for _, length in cut}) > 1
