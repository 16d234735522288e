"""Whole SFT runs: it learns, the split does not matter, and it resumes bit for bit."""

import json

import pytest
from safetensors.torch import load_file

from tests.launch import flags, metrics, run

TRAIN = "sft_core.train"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with path.open("w") as file:
        for i in range(20):
            turns = [("user", f"Ben has {10 + i} pens."), ("assistant", f"{10 + i}" * (1 + i % 3))]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    return path


def train(tiny_model, rows, out, ranks=1, **more):
    options = dict(model_name_or_path=tiny_model, dataset_name=rows, output_dir=out, max_steps=6, learning_rate=1e-2,
                   lr_scheduler_type="constant", per_device_train_batch_size=8 // ranks, save_strategy="no",
                   report_to=["none"])  # fmt: skip
    code, output = run(TRAIN, flags(**(options | more)), out.parent / f"{out.name}.log", ranks=ranks)
    assert code == 0, output
    return load_file(out / "model.safetensors")


def test_learns_alike_however_the_step_is_cut(tiny_model, rows, tmp_path):
    whole = train(tiny_model, rows, tmp_path / "whole")
    losses = [row["loss"] for row in metrics(tmp_path / "whole")]
    assert losses[-1] < 0.7 * losses[0]
    for name, more in {"one": {"max_tokens_per_micro_batch": 1}, "two": {"ranks": 2}, "acc": {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": "true",
    }}.items():  # fmt: skip
        cut = train(tiny_model, rows, tmp_path / name, **more)
        assert [row["loss"] for row in metrics(tmp_path / name)] == pytest.approx(losses, rel=1e-4)
        assert all((cut[key] - whole[key]).norm() < 1e-3 * whole[key].norm() for key in whole)


def test_resumes_bitwise(tiny_model, rows, tmp_path):
    whole = train(tiny_model, rows, tmp_path / "whole")
    saving = dict(save_strategy="steps", save_steps=2)
    train(tiny_model, rows, tmp_path / "out", max_steps=4, **saving)
    found = train(tiny_model, rows, tmp_path / "out", **saving)
    assert all((found[key] == whole[key]).all() for key in whole)
    assert [r["loss"] for r in metrics(tmp_path / "out")] == [r["loss"] for r in metrics(tmp_path / "whole")]
