import importlib.util
import json
import math
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from sft_core.run import trackers
from sft_core.run.config import ModelConfig, SFTConfig
from sft_core.run.distributed import init_distributed, shutdown
from sft_core.run.logging import MetricsLogger, announce, cut_back, merge_metrics, reduce_metrics
from tests.processes import run_ranks, start


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scalars(folder, name):
    accumulator = EventAccumulator(str(folder / "runs"))
    accumulator.Reload()
    return [(event.step, pytest.approx(event.value)) for event in accumulator.Scalars(name)]


def write_steps(folder, steps, resume_step, factor=1.0):
    logger = MetricsLogger(folder, ["tensorboard"], resume_step, {"learning_rate": 1e-5}, console=("reward", "absent"))
    for step in steps:
        logger.log(step, {"reward": factor * step, "loss": math.nan})
        logger.log_completions(step, [{"prompt": "2+2", "completion": "4\u2028\n", "reward": factor, "advantage": 0.5}])
    logger.close()


def test_logs_are_cut_back_to_the_step_resumed_from(tmp_path):
    write_steps(tmp_path, range(1, 7), resume_step=0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "rew')  # cut off by a kill
    write_steps(tmp_path, range(5, 8), resume_step=4, factor=10.0)
    expected = [1, 2, 3, 4, 50, 60, 70]
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["reward"] for row in lines(tmp_path / "metrics.jsonl")] == expected
    rows = [json.loads(line) for line in open(tmp_path / "completions.jsonl", newline="\n")]
    assert [row["reward"] for row in rows] == [1, 1, 1, 1, 10, 10, 10]
    assert {row["completion"] for row in rows} == {"4\u2028\n"}
    assert scalars(tmp_path, "reward") == list(enumerate(expected, start=1))


def test_a_new_start_of_an_unsaved_run_forgets_everything(tmp_path):
    write_steps(tmp_path, range(4), resume_step=0)  # from an evaluation before the first step
    write_steps(tmp_path, range(2), resume_step=0)
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [0, 1]
    assert scalars(tmp_path, "reward") == [(0, 0.0), (1, 1.0)]


def test_text_samples_console_and_nan(tmp_path, capsys):
    write_steps(tmp_path, [3], resume_step=0)
    accumulator = EventAccumulator(str(tmp_path / "runs"))
    accumulator.Reload()
    assert {"config/text_summary", "completions/text_summary"} <= set(accumulator.Tags()["tensors"])
    text = accumulator.Tensors("completions/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "2+2" in text and "advantage 0.5" in text
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 3, "reward": 3.0, "loss": None}]
    assert capsys.readouterr().out == "step 3 | reward 3\n"


def log_and_hang(folder):
    logger = MetricsLogger(folder)
    for step in (1, 2):
        logger.log(step, {"reward": float(step)})
    (folder / "logged").touch()
    time.sleep(600)


def test_what_was_logged_survives_kill_nine(tmp_path):
    process = start(log_and_hang, tmp_path)
    while not (tmp_path / "logged").exists():
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    deadline = time.monotonic() + 30
    while scalars(tmp_path, "reward") != [(1, 1.0), (2, 2.0)]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_none_writes_jsonl_only(tmp_path):
    MetricsLogger(tmp_path, ["none"]).log(1, {"reward": 1.0})
    assert len(lines(tmp_path / "metrics.jsonl")) == 1 and not (tmp_path / "runs").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="the package is there")
def test_wandb_without_its_package_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError, match="pip install wandb"):
        MetricsLogger(tmp_path, ["tensorboard", "wandb"])


@pytest.mark.parametrize("failed", [False, True])
def test_wandb_gets_the_runs_options_and_the_same_run_after_a_restart(tmp_path, monkeypatch, failed):
    made, ended = [], []

    class Tracker(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            wandb = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
            made.append((args.run_name, args.to_dict(), wandb))

    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=ended.append))
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    options = {"run_name": "r", "wandb_entity": "e", "wandb_project": "p", "wandb_run_group": "g"}
    for _ in range(2):
        MetricsLogger(tmp_path, ["wandb"], options=options).close(failed)
    assert made[0] == made[1] and made[0][:2] == ("r", options) and ended == [failed, failed]
    environment = made[0][2]
    assert [environment[f"WANDB_{name}"] for name in ("ENTITY", "PROJECT", "RUN_GROUP")] == ["e", "p", "g"]
    assert len(environment["WANDB_RUN_ID"]) == 32 and environment["WANDB_RESUME"] == "allow"
    assert environment["WANDB_DIR"] == str(tmp_path)


@pytest.fixture
def tracked(monkeypatch):
    """The calls, in order, that a tracker gets which transformers integrates as `mlflow`."""
    told = []

    class Tracker(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            told.append(("begin", args.run_name, args.project, args.to_dict(), state.is_world_process_zero))

        def on_log(self, args, state, control, logs, **kwargs):
            told.append(("log", state.global_step, state.epoch, logs))

        def on_train_end(self, args, state, control, **kwargs):
            told.append("end")

    module = SimpleNamespace(end_run=lambda status: told.append(status))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "mlflow", Tracker)
    monkeypatch.setattr(trackers, "get_available_reporting_integrations", lambda: ["tensorboard", "mlflow"])
    return told


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("report_to", [["mlflow"], ["none", "mlflow"], ["all"]])
def test_a_tracker_gets_options_metrics_and_the_end(tmp_path, tracked, report_to, failed):
    options = {"run_name": "r", "learning_rate": 1e-5, "reward_funcs": ["a", "b"]}
    logger = MetricsLogger(tmp_path, report_to, 4, options)
    logger.log(5, {"reward": 0.5, "epoch": 1.5, "kl": math.nan})
    logger.close(failed)
    began, logged, *ended = tracked
    assert began == ("begin", "r", "huggingface", options, True)
    assert logged == ("log", 5, 1.5, {"reward": 0.5, "epoch": 1.5})
    assert ended == (["FAILED", "end"] if failed else ["end"])
    assert (tmp_path / "runs").exists() == (report_to == ["all"])


@pytest.mark.parametrize("failed", [False, True])
def test_mlflow_itself(tmp_path, monkeypatch, failed):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    logger = MetricsLogger(tmp_path / "out", ["mlflow"], options={"run_name": "r", "learning_rate": 1e-5})
    logger.log(1, {"reward": 0.5})
    logger.close(failed)
    [run] = mlflow.search_runs(output_format="list")
    assert (run.info.run_name, run.info.status) == ("r", "FAILED" if failed else "FINISHED")
    assert run.data.metrics == {"reward": 0.5} and run.data.params["learning_rate"] == "1e-05"


def test_cut_back_leaves_no_file_where_there_was_none(tmp_path):
    cut_back(tmp_path / "metrics.jsonl", 3)
    assert not any(tmp_path.iterdir())


def reduce_on_ranks(folder):
    rank, *_ = init_distributed(60)
    sums = {"tokens": torch.tensor(3 + rank), "loss": 0.1 * (rank + 1)}
    sums = sums if rank == 0 else dict(reversed(sums.items()))
    reduced = reduce_metrics(sums | {"length/max": 5.0 - rank, "length_min": torch.tensor(2.0 + rank), "nan": math.nan})
    MetricsLogger(folder / str(rank)).log(1, reduced)
    shutdown()
    return reduced


def test_reduce_metrics_over_ranks_and_only_the_first_writes(tmp_path):
    first, second = run_ranks(2, reduce_on_ranks, tmp_path)
    assert math.isnan(first.pop("nan")) and math.isnan(second.pop("nan"))
    assert first == second == {"tokens": 7.0, "loss": 0.1 + 0.2, "length/max": 5.0, "length_min": 2.0}
    assert (tmp_path / "0" / "metrics.jsonl").exists() and not (tmp_path / "1").exists()


def test_reduce_metrics_of_one_process():
    assert reduce_metrics({"a": torch.tensor(2, dtype=torch.int64), "b": 0.1}) == {"a": 2.0, "b": 0.1}
    assert reduce_metrics({"a/max": torch.tensor(1.5)}) == {"a/max": 1.5}
    assert reduce_metrics({"s": 1, "a_min": True}) == {"s": 1.0, "a_min": 1.0}
    assert reduce_metrics({}) == {}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("loss", 3.0), ("low_min", 1.0), ("ratio/min", 1.0), ("peak/max", 2.0), ("admin", 3.0), ("max_tokens", 3.0)],
)
def test_micro_batches_and_ranks_follow_one_rule(name, expected):
    """Values are summed, except for names whose last word is min or max."""
    assert merge_metrics([{name: torch.tensor(value)} for value in (1.0, 2.0)])[name] == expected


def reduce_different_keys():
    rank, *_ = init_distributed(60)
    try:
        reduce_metrics({f"metric_{rank}": 1.0})
    except AssertionError as error:
        return str(error)


def test_ranks_that_reduce_different_metrics_are_found_out():
    assert all("different metrics" in said for said in run_ranks(2, reduce_different_keys))


@pytest.mark.parametrize(("kind", "warns"), [("constant", True), ("constant_with_warmup", False)])
def test_a_warm_up_that_the_schedule_does_not_have_is_reported(kind, warns, caplog):
    config = SFTConfig(output_dir="o", lr_scheduler_type=kind, warmup_ratio=0.1)
    run = SimpleNamespace(rank=0, world_size=1, device="cpu", bf16=False, data=None, summary="", checkpoint=None)
    run.model, run.config = ModelConfig("m"), config
    announce(run)
    assert ("constant has no warm-up" in caplog.text) == warns
