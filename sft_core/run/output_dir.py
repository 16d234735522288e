"""The output folder before a run: whose it is, and from which checkpoint the run goes on.

    checkpoint-<step>/       written by `sft_core/model/checkpoint.py`: complete, or not there
    latest                   names the checkpoint that was written last
    run.json                 the identity of the run: what its results depend on
    previous-<n>/            an earlier run, moved aside by --overwrite_output_dir or `train()`

Nothing is ever deleted but what a killed save left behind.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_core.run.distributed import on_first_rank
from sft_core.run.files import describe, flush_to_disk, write_atomically

STATE, MANIFEST, POINTER, RUN = "progress.json", "manifest.json", "latest", "run.json"
FORMAT = 2  # of a checkpoint
FINISHED = ".finished"  # holds the identity of the run that has left nothing to do
GIVEN = ".given-"  # and a digest: a model that a trainer class was handed, which several runs may need


# --- the decision ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What lies in an output folder."""

    recorded: bool = False  # it has a run.json
    difference: str | None = None  # what tells its run from the one that is to begin
    checkpoint: Path | None = None  # the one to go on from
    unreadable: str | None = None  # why it has checkpoints and none can be read
    model: bool = False
    results: bool = False  # a model, checkpoints, or a log with lines


def decide(
    folder: Path, found: Found, overwrite: bool, resume_from: Path | None = None, anew: bool = False
) -> tuple[Path | None, str | None]:
    """The checkpoint to go on from, and why what is in the folder is moved aside before (None: it stays). Our own
    checkpoints always resume; another run's results are kept.

    `resume_from`: a checkpoint of this run's identity, of whatever folder, instead of the last one in this; `anew`: the
    run is to begin at its first step.

    Raises:
        ValueError: the folder holds another run's results, or checkpoints that cannot be read.
    """
    if anew:
        return resume_from, "train() begins anew" if found.results else None
    if found.unreadable and not overwrite:
        raise ValueError(
            f"No checkpoint in {folder} is readable ({found.unreadable}); restore one, or start anew with "
            "--overwrite_output_dir or another --output_dir."
        )
    why = found.difference
    if found.unreadable:
        why = "none of its checkpoints is readable"
    elif why is None and found.model and found.checkpoint is None and resume_from is None:
        why = "a finished model without a checkpoint to go on from" if found.recorded else f"no {RUN}"
    if why is not None and found.results and not overwrite:
        raise ValueError(
            f"{folder} holds another run ({why}); choose another --output_dir, or give --overwrite_output_dir to move "
            "that run aside into it."
        )
    return resume_from or (found.checkpoint if why is None else None), why


def prepare_output_dir(
    output_dir: str | Path,
    identity: dict[str, Any],
    overwrite: bool,
    resume_from: str | None = None,
    anew: bool = False,
) -> Path | None:
    """Make `output_dir` that of the run of this `identity`; returns the checkpoint to resume from. A collective.

    `identity`: what makes it this run (algorithm, model, data fingerprint, seed), as JSON-able values, and `options`,
    which may differ.

    Raises:
        ValueError: the folder holds another run's results, or the checkpoint that is named cannot be resumed from.
    """
    folder, named = Path(output_dir), None if resume_from is None else Path(resume_from)
    identity = json.loads(json.dumps(identity))

    def prepare() -> Path | None:
        if named is not None:
            reason = unreadable_reason(named)
            if reason is None and (difference := differences(read_state(named)["identity"], identity)):
                reason = f"it is of another run: {difference}"
            if reason is not None:
                raise ValueError(f"cannot resume from {resume_from}: {reason}. Check --resume_from_checkpoint.")
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint, why = decide(folder, look_into(folder, identity), overwrite, named, anew)
        if why is not None:
            move_aside(folder, why)
        write_atomically(folder / RUN, json.dumps(identity, indent=2) + "\n")
        return checkpoint

    return on_first_rank(prepare)


def is_finished(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether a run of this identity, its options included, has finished here and left nothing to do."""
    said = folder / FINISHED
    return said.is_file() and said.read_text() == json.dumps(identity) and any(folder.glob("*.safetensors"))


def look_into(folder: Path, identity: dict[str, Any]) -> Found:
    record, log = folder / RUN, folder / "metrics.jsonl"
    difference = differences(json.loads(record.read_text()), identity) if record.is_file() else None
    checkpoint = unreadable = None
    if difference is None:
        checkpoint, unreadable = find_checkpoint(folder)
    if checkpoint is not None:
        difference = differences(read_state(checkpoint)["identity"], identity)
    model = any(folder.glob("*.safetensors"))
    results = model or any(checkpoints(folder)) or (log.is_file() and log.stat().st_size > 0)
    return Found(record.is_file(), difference, checkpoint, unreadable, model, results)


def differences(recorded: dict[str, Any], identity: dict[str, Any]) -> str | None:
    """What tells the recorded identity from this one, or None."""
    different = [key for key in {**identity, **recorded} if identity.get(key) != recorded.get(key) and key != "options"]
    if "algorithm" in different:
        different = ["algorithm"]
    says = []
    for key in different:
        there, here = (f"{side.get(key)!r:.99}" for side in (recorded, identity))
        says.append(f"{key} is {there} there, {here} here" if there != here else f"{key} is another")
    return "; ".join(says) or None


def move_aside(folder: Path, why: str) -> None:
    """Move what is in the folder into `previous-<n>`."""
    number = 1 + max((int(path.name.split("-")[1]) for path in folder.glob("previous-*")), default=0)
    aside = folder / f"previous-{number}"
    entries = [path for path in folder.iterdir() if not path.name.startswith((".lock", GIVEN, "previous-"))]
    if not entries:
        return
    aside.mkdir()
    for entry in sorted(entries, key=lambda path: path.name == RUN):  # run.json last: until then it is another run
        os.rename(entry, aside / entry.name)
    flush_to_disk(folder)
    print(f"moved what was in {folder} to {aside} ({why})", flush=True)


# --- the checkpoints in it ---------------------------------------------------------------------------------------


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-<step>` folders, oldest step first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Step, world size, identity and progress."""
    return json.loads((checkpoint / STATE).read_text())


def find_checkpoint(folder: Path) -> tuple[Path | None, str | None]:
    """The checkpoint that `latest` names, else the newest readable one before it; and if there are some of which none
    is readable, why. Unreadable ones are reported and passed over. First rank only."""
    clean_up(folder)
    candidates = checkpoints(folder)
    pointer = folder / POINTER
    pointed = folder / pointer.read_text(errors="replace").strip() if pointer.is_file() else None
    if pointed in candidates:  # later ones, if any, were never pointed to: the run did not go on from them
        candidates = candidates[: candidates.index(pointed) + 1]
    problems = []
    for checkpoint in reversed(candidates):
        reason = unreadable_reason(checkpoint)
        if reason is None:
            return checkpoint, None
        problems.append(f"{checkpoint.name}: {reason}")
        print(f"warning: {checkpoint} is unreadable ({reason}); trying the one before it", flush=True)
    return None, "; ".join(problems) or None


def unreadable_reason(checkpoint: Path) -> str | None:
    """Why this checkpoint cannot be used, or None when every file is as it was written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except ValueError:
        return f"{MANIFEST} is damaged"
    if manifest.get("format") != FORMAT:
        return f"its format is {manifest.get('format', 1)}, this version reads {FORMAT}"
    files = manifest["files"]
    if "state/.metadata" not in files:
        return "it holds the model alone (save_only_model)"
    missing = [name for name in files if not (checkpoint / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    for name, found in describe(checkpoint, [checkpoint / name for name in files]).items():
        if found != files[name]:
            return f"{name} is damaged: [bytes, crc32] are {found} instead of {files[name]}"
    return None


def clean_up(folder: Path) -> None:
    """Finish or undo what a killed save left behind."""
    for leftover in (*folder.glob(".checkpoint-*.tmp"), *folder.glob(".checkpoint-*.pruned")):
        shutil.rmtree(leftover)
    for replaced in folder.glob(".checkpoint-*.replaced"):
        original = folder / replaced.name.removeprefix(".").removesuffix(".replaced")
        if original.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, original)
