"""What a start does with an output folder, one row per case."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from sft_core.run.output_dir import Found, decide, prepare_output_dir

LAST, NAMED = Path("out/checkpoint-9"), Path("other/checkpoint-4")
OURS = Found(recorded=True, checkpoint=LAST, results=True)
MODEL = Found(recorded=True, model=True, results=True)
OTHER = Found(recorded=True, difference="seed is 1 there, 2 here", results=True)
UNREADABLE = Found(recorded=True, unreadable="checkpoint-9: rng.pt is missing", results=True)


@pytest.mark.parametrize(
    ("found", "overwrite", "named", "expected", "says"),
    [
        (Found(), False, None, "fresh", ""),
        (Found(), True, None, "fresh", ""),
        (Found(recorded=True), False, None, "fresh", ""),  # a start that saved nothing
        (Found(), False, NAMED, "resume", NAMED),
        (OURS, False, None, "resume", LAST),
        (OURS, True, None, "resume", LAST),
        (OURS, False, NAMED, "resume", NAMED),
        (MODEL, False, NAMED, "resume", NAMED),
        (MODEL, False, None, "refuse", "a finished model without a checkpoint.*--overwrite_output_dir"),
        (MODEL, True, None, "aside", "a finished model without a checkpoint"),
        (replace(MODEL, recorded=False), False, None, "refuse", "no run.json"),
        (OTHER, False, None, "refuse", "another run .seed is 1 there, 2 here.*--output_dir.*--overwrite_output_dir"),
        (OTHER, False, NAMED, "refuse", "seed is 1 there"),
        (OTHER, True, None, "aside", "seed is 1 there"),
        (replace(OTHER, results=False), False, None, "aside", "seed is 1 there"),
        (UNREADABLE, False, None, "refuse", "no checkpoint in out is readable .*rng.pt.*--overwrite_output_dir"),
        (UNREADABLE, True, None, "aside", "none of its checkpoints is readable"),
    ],
)
def test_what_becomes_of_an_output_folder(found, overwrite, named, expected, says):
    if expected == "refuse":
        with pytest.raises(ValueError, match=says):
            decide(Path("out"), found, overwrite, named)
        return
    checkpoint, why = decide(Path("out"), found, overwrite, named)
    assert (why is not None) == (expected == "aside") and checkpoint == (says if expected == "resume" else None)
    if expected == "aside":
        assert re.search(says, why)


def test_a_model_without_a_run_is_kept_and_a_log_without_lines_is_not_in_the_way(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="no run.json"):
        prepare_output_dir(tmp_path, {"seed": 1}, overwrite=False)
    assert prepare_output_dir(tmp_path / "new", {"seed": 1}, overwrite=False) is None
    (tmp_path / "new" / "metrics.jsonl").touch()
    assert prepare_output_dir(tmp_path / "new", {"seed": 2}, overwrite=False) is None
    assert (tmp_path / "new" / "previous-1" / "metrics.jsonl").exists()
