"""The push_to_hub_revision callback: from a saved checkpoint to its branch and its benchmark metrics."""

import json
import os
import shutil

import pytest

from sft_core.run.benchmarks import get_callbacks, run_benchmarks
from sft_core.run.config import ModelConfig, SFTConfig
from sft_core.run.hub import check_hub
from tests.hub_server import HubServer


@pytest.fixture
def options(tmp_path):
    problems = tmp_path / "bench.jsonl"
    rows = [{"problem": f"Ben has {i}.", "solution": f"\\boxed{{{i}}}", "answer": str(i)} for i in range(2)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "output_dir": str(tmp_path / "out"),
        "benchmarks": ["math_500"],
        "system_prompt": "Be right.",
        "hub_model_id": "me/m",
        "hub_model_revision": "v1",
        "callbacks": ["push_to_hub_revision"],
        "benchmark_kwargs": {"dataset": [f"math_500={problems}"], "engine": "torch", "max_new_tokens": 4},
    }


@pytest.mark.slow
def test_branch_and_benchmarks_of_a_checkpoint_that_is_gone(tiny_model, options, tmp_path, monkeypatch):
    checkpoint = tmp_path / "out/checkpoint-7"
    shutil.copytree(tiny_model, checkpoint)
    (checkpoint / "state").mkdir()
    (checkpoint / "state/optimizer").write_text("x")
    model = (checkpoint / "model.safetensors").read_bytes()
    with HubServer() as hub:
        hub.take_over(monkeypatch)
        config = SFTConfig(**options)
        check_hub(config)
        [callback] = get_callbacks(config, ModelConfig(model_name_or_path=tiny_model))
        callback.on_save(7, checkpoint)
        shutil.rmtree(checkpoint)  # like save_total_limit
        assert callback.close() == []
        [(step, figures)] = callback.results
        pushed = hub.repos["me/m"].files("v1-step-000000007")
        assert hub.repos["me/m"].files("main") == {}
    assert step == 7 and 0 <= figures["benchmarks/math_500/pass@1"] <= 1
    assert pushed["model.safetensors"] == model
    assert not [name for name in pushed if name.startswith("state")]
    assert not list((tmp_path / "out").glob(".upload-*"))
    details = json.loads((tmp_path / "out/benchmarks/checkpoint-7/results.json").read_text())
    assert details["config"]["math_500"]["system_prompt"] == "Be right."


@pytest.mark.slow
def test_benchmarks_of_other_weights_do_not_go_on_with_old_samples(tiny_model, options, tmp_path):
    model, folder = tmp_path / "model", tmp_path / "benchmarks"
    shutil.copytree(tiny_model, model)
    first = run_benchmarks(model, SFTConfig(**options), folder)
    os.utime(model / "model.safetensors")  # as if trained further
    assert run_benchmarks(model, SFTConfig(**options), folder).keys() == first.keys()
    assert (folder / "previous-1/results.json").is_file() and (folder / "results.json").is_file()


def test_a_failing_benchmark_says_why(options, tmp_path):
    with pytest.raises(RuntimeError, match="exit code 2 .*log.txt.*nowhere"):
        run_benchmarks(tmp_path / "nowhere", SFTConfig(**options), tmp_path / "benchmarks")


def test_callbacks_by_name(options):
    with pytest.raises(ValueError, match="callbacks.*push_to_hub_revision.*push_to_hub_revison"):
        SFTConfig(**options | {"callbacks": ["push_to_hub_revison"]})
    assert get_callbacks(SFTConfig(**options | {"callbacks": []}), None) == []
