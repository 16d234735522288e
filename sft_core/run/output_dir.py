"""Prepares the output folder before a run: checks which run it belongs to, and finds the checkpoint to resume from.

    checkpoint-<step>/       written by `sft_core/model/checkpoint.py`: complete, or absent
    latest                   names the checkpoint that was written last
    run.json                 the identity of the run: everything that its results depend on
    previous-<n>/            an earlier run, moved aside by --overwrite_output_dir or `train()`

Only leftovers of a killed save are ever deleted.
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
FINISHED = ".finished"  # holds the identity of a run that is completely finished
GIVEN = ".given-"  # followed by a digest: a model object passed to a trainer class, which several runs may use


# --- the decision ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The content of an output folder."""

    recorded: bool = False  # it has a run.json
    difference: str | None = None  # how its run differs from the new one
    checkpoint: Path | None = None  # the checkpoint to resume from
    unreadable: str | None = None  # why none of its checkpoints can be read
    model: bool = False
    results: bool = False  # a model, checkpoints, or a log with lines


def decide(
    folder: Path, found: Found, overwrite: bool, resume_from: Path | None = None, anew: bool = False
) -> tuple[Path | None, str | None]:
    """The checkpoint to resume from, and the reason to move the folder's content aside first (None: it stays). A run
    always resumes from its own checkpoints; another run's results are kept.

    `resume_from`: a checkpoint with this run's identity, in any folder, instead of the last one in this folder; `anew`:
    start from step 0.

    Raises:
        ValueError: the folder holds another run's results, or checkpoints that cannot be read.
    """
    if anew:
        return resume_from, "train() starts over" if found.results else None
    if found.unreadable and not overwrite:
        raise ValueError(
            f"no checkpoint in {folder} is readable ({found.unreadable}): restore one, or start over with "
            "--overwrite_output_dir or another --output_dir."
        )
    why = found.difference
    if found.unreadable:
        why = "none of its checkpoints is readable"
    elif why is None and found.model and found.checkpoint is None and resume_from is None:
        why = "a finished model without a checkpoint to resume from" if found.recorded else f"no {RUN}"
    if why is not None and found.results and not overwrite:
        raise ValueError(
            f"{folder} holds another run ({why}): choose another --output_dir, or give --overwrite_output_dir to move "
            "that run into a subfolder."
        )
    return resume_from or (found.checkpoint if why is None else None), why


def prepare_output_dir(
    output_dir: str | Path,
    identity: dict[str, Any],
    overwrite: bool,
    resume_from: str | None = None,
    anew: bool = False,
) -> Path | None:
    """Prepare `output_dir` for the run with this `identity`; returns the checkpoint to resume from. A collective.

    `identity`: JSON-able values that identify the run (algorithm, model, data fingerprint, seed), and `options`, which
    may differ when it resumes.

    Raises:
        ValueError: the folder holds another run's results, or the run cannot resume from the named checkpoint.
    """
    folder, named = Path(output_dir), None if resume_from is None else Path(resume_from)
    identity = json.loads(json.dumps(identity))

    def prepare() -> Path | None:
        if named is not None:
            reason = unreadable_reason(named)
            if reason is None and (difference := differences(read_state(named)["identity"], identity)):
                reason = f"it belongs to another run: {difference}"
            if reason is not None:
                raise ValueError(f"cannot resume from {resume_from}: {reason}; check --resume_from_checkpoint.")
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint, why = decide(folder, look_into(folder, identity), overwrite, named, anew)
        if why is not None:
            move_aside(folder, why)
        write_atomically(folder / RUN, json.dumps(identity, indent=2) + "\n")
        return checkpoint

    return on_first_rank(prepare)


def is_finished(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether a run with this identity and the same options has finished here completely."""
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
    """How the recorded identity differs from this one, or None."""
    different = [key for key in {**identity, **recorded} if identity.get(key) != recorded.get(key) and key != "options"]
    if "algorithm" in different:
        different = ["algorithm"]
    says = []
    for key in different:
        there, here = (f"{side.get(key)!r:.99}" for side in (recorded, identity))
        says.append(f"{key} is {there} there, {here} here" if there != here else f"{key} differs")
    return "; ".join(says) or None


def move_aside(folder: Path, why: str) -> None:
    """Move the folder's content into `previous-<n>` in it."""
    number = 1 + max((int(path.name.split("-")[1]) for path in folder.glob("previous-*")), default=0)
    aside = folder / f"previous-{number}"
    entries = [path for path in folder.iterdir() if not path.name.startswith((".lock", GIVEN, "previous-"))]
    if not entries:
        return
    aside.mkdir()
    for entry in sorted(entries, key=lambda path: path.name == RUN):  # run.json last: until then it is another run
        os.rename(entry, aside / entry.name)
    flush_to_disk(folder)
    print(f"moved the content of {folder} to {aside} ({why})", flush=True)


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
    """The checkpoint that `latest` names, or the newest readable one before it. If there are checkpoints and none is
    readable, also the reason. Unreadable checkpoints are reported and skipped. First rank only."""
    clean_up(folder)
    candidates = checkpoints(folder)
    pointer = folder / POINTER
    pointed = folder / pointer.read_text(errors="replace").strip() if pointer.is_file() else None
    if pointed in candidates:  # skip later ones, from which the run did not continue
        candidates = candidates[: candidates.index(pointed) + 1]
    problems = []
    for checkpoint in reversed(candidates):
        reason = unreadable_reason(checkpoint)
        if reason is None:
            return checkpoint, None
        problems.append(f"{checkpoint.name}: {reason}")
        print(f"warning: {checkpoint} is unreadable ({reason}); trying the previous one", flush=True)
    return None, "; ".join(problems) or None


def unreadable_reason(checkpoint: Path) -> str | None:
    """Why this checkpoint cannot be used, or None if every file is as it was written."""
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
        return "it holds only the model (save_only_model)"
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
