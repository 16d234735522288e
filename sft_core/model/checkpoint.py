"""Checkpoints that survive kill -9 at any moment, and the question whose they are.

A checkpoint is complete or it is not there: everything goes into `.checkpoint-<step>.tmp`, is flushed to the disk, gets
a manifest (size and checksum of each file) as its last file, is renamed to `checkpoint-<step>`, and only then does the
file `latest` name it. Inside:

    the model             as a Hugging Face folder, put there by the caller's `write_model`
    state/                what is trained of the model, and the optimizer, by torch.distributed.checkpoint: loads with
                          any number of ranks
    scheduler.pt          the schedule's state
    rank-00000/           that rank's random generators (rng.pt) and whatever the caller's `write_extra` put there
    progress.json         step, world size, identity and the caller's `progress`, readable
    manifest.json         written last

Left out on purpose: asynchronous saving, and folders that the ranks do not share. In this order, on every rank:

    checkpoint = prepare_output_dir(output_dir, identity, overwrite)              # before weights are loaded
    progress = load_checkpoint(checkpoint, model, optimizer, scheduler) if checkpoint else {}
    save_checkpoint(output_dir, step, model, optimizer, scheduler, progress=..., identity=..., save_total_limit=2)
"""

import json
import os
import random
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from sft_core.model.export import hf_name, reshard
from sft_core.run.distributed import on_first_rank
from sft_core.run.files import MANIFEST, flush_to_disk, manifest, write_atomically

STATE, POINTER, RUN = "progress.json", "latest", "run.json"


# --- which checkpoint, and whose ---------------------------------------------------------------------------------


def unreadable_reason(checkpoint: Path) -> str | None:
    """Why this checkpoint cannot be used, or None when every file is as it was written."""
    if not (checkpoint / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        expected = json.loads((checkpoint / MANIFEST).read_text())
    except ValueError:
        return f"{MANIFEST} is damaged"
    if not isinstance(expected, dict):
        return f"{MANIFEST} is damaged"
    if STATE not in expected:
        return f"{STATE} is missing"
    if "state/.metadata" not in expected:
        return "it holds the model alone (save_only_model)"
    found = manifest(checkpoint)
    for name, description in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != description:
            return f"{name} is damaged: [bytes, crc32] are {found[name]} instead of {description}"
    return None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-<step>` folders, oldest step first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def find_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint `latest` names, else the newest readable one before it; None when there is none at all.

    Unreadable ones are reported and passed over. First rank only.
    Raises ValueError when there are checkpoints and none is readable.
    """
    folder = Path(output_dir)
    _clean_up(folder)
    candidates = checkpoints(folder)
    pointer = folder / POINTER
    pointed = folder / pointer.read_text(errors="replace").strip() if pointer.is_file() else None
    if pointed in candidates:  # later ones, if any, were never pointed to: the run did not go on from them
        candidates = candidates[: candidates.index(pointed) + 1]
    problems = []
    for checkpoint in reversed(candidates):
        reason = unreadable_reason(checkpoint)
        if reason is None:
            return checkpoint
        problems.append(f"{checkpoint.name}: {reason}")
        print(f"warning: {checkpoint} is unreadable ({reason}); trying the one before it", flush=True)
    if problems:
        raise ValueError(
            f"No checkpoint in {folder} is readable ({'; '.join(problems)}); restore one, or start anew with "
            "--overwrite_output_dir or another --output_dir."
        )
    return None


def _clean_up(folder: Path) -> None:
    """Finish or undo what a killed save left behind."""
    for temporary in folder.glob(".checkpoint-*.tmp"):
        shutil.rmtree(temporary)
    for pruned in folder.glob(".checkpoint-*.pruned"):
        shutil.rmtree(pruned)
    for replaced in folder.glob(".checkpoint-*.replaced"):
        original = folder / replaced.name.removeprefix(".").removesuffix(".replaced")
        if original.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, original)


def prepare_output_dir(
    output_dir: str | Path, identity: dict[str, Any], overwrite_output_dir: bool, resume_from: str | None = None
) -> Path | None:
    """Claim `output_dir` for the run of this `identity`; returns the checkpoint to resume from, or None. A collective.

    `identity`: what makes it this run (algorithm, model, data fingerprint, seed), as JSON-able values, and `options`,
    which may differ. Our own checkpoints always resume. A folder that holds another run's results raises ValueError
    saying what differs, or with `overwrite_output_dir` has everything in it moved to `previous-<n>/`. Nothing is ever
    deleted. `resume_from`: a checkpoint of the same identity, of whatever folder, to go on from instead of the last one
    in this.
    """
    folder = Path(output_dir)
    identity = json.loads(json.dumps(identity))

    def claim() -> Path | None:
        if resume_from is not None:
            reason = unreadable_reason(Path(resume_from))
            if reason is None and (difference := differences(json.dumps(_saved(resume_from)["identity"]), identity)):
                reason = f"it is of another run: {difference}"
            if reason is not None:
                raise ValueError(f"cannot resume from {resume_from}: {reason}. Check --resume_from_checkpoint.")
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / RUN
        difference = differences(record.read_text(), identity) if record.is_file() else None
        checkpoint = None
        if difference is None:
            try:
                checkpoint = find_checkpoint(folder)
            except ValueError:
                if not overwrite_output_dir:
                    raise
                difference = "none of its checkpoints is readable"
        if checkpoint is not None:
            difference = differences(json.dumps(_saved(checkpoint)["identity"]), identity)
        elif difference is None and any(folder.glob("*.safetensors")) and resume_from is None:
            difference = "a finished model without a checkpoint to go on from" if record.is_file() else f"no {RUN}"
        if difference is not None:
            log = folder / "metrics.jsonl"
            logged = log.is_file() and log.stat().st_size > 0
            has_results = logged or any(checkpoints(folder)) or any(folder.glob("*.safetensors"))
            if has_results and not overwrite_output_dir:
                raise ValueError(
                    f"{folder} holds another run ({difference}); choose another --output_dir, or give "
                    "--overwrite_output_dir to move that run aside into it."
                )
            _move_aside(folder, difference)
            checkpoint = None
        write_atomically(folder / RUN, json.dumps(identity, indent=2) + "\n")
        return checkpoint if resume_from is None else Path(resume_from)

    return on_first_rank(claim)


def differences(recorded: str, identity: dict[str, Any]) -> str | None:
    """What tells the recorded identity (JSON) from this one, or None."""
    there = json.loads(recorded)
    different = [key for key in {**identity, **there} if identity.get(key) != there.get(key) and key != "options"]
    if "algorithm" in different:
        different = ["algorithm"]
    values = {key: [f"{side.get(key)!r:.99}" for side in (there, identity)] for key in different}
    says = [f"{key} is {a} there, {b} here" if a != b else f"{key} is another" for key, (a, b) in values.items()]
    return "; ".join(says) or None


def _move_aside(folder: Path, why: str) -> None:
    number = 1 + max((int(path.name.split("-")[1]) for path in folder.glob("previous-*")), default=0)
    aside = folder / f"previous-{number}"
    entries = [path for path in folder.iterdir() if path.name != ".lock" and not path.name.startswith("previous-")]
    if not entries:
        return
    aside.mkdir()
    for entry in sorted(entries, key=lambda path: path.name == RUN):  # run.json last: until then it is another run
        os.rename(entry, aside / entry.name)
    flush_to_disk(folder)
    print(f"moved the earlier run in {folder} to {aside} ({why})", flush=True)


# --- save and load -----------------------------------------------------------------------------------------------


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
    *,
    progress: dict[str, Any],
    identity: dict[str, Any],
    save_total_limit: int | None = None,
    write_extra: Callable[[Path], None] | None = None,
    write_model: Callable[[Path], None] | None = None,
    only_model: bool = False,
) -> Path:
    """Write `checkpoint-<step>` and point `latest` to it. A collective.

    `progress`: JSON-able, the same on every rank, given back by `load_checkpoint`. `write_extra(folder)` is called on
    every rank with its own `rank-<r>` folder, `write_model(folder)` with the checkpoint's; with `only_model` nothing
    else is written, and no run resumes from it. The oldest beyond `save_total_limit` go, never the one just written.
    """
    folder = Path(output_dir)
    final, temporary = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.tmp"

    def start() -> None:
        _clean_up(folder)
        temporary.mkdir(parents=True)

    on_first_rank(start)
    if write_model is not None:
        write_model(temporary)
    if not only_model:
        dcp.save(_trained_state(model, optimizer), checkpoint_id=temporary / "state")
        own = rank_folder(temporary, dist.get_rank())
        own.mkdir()
        torch.save(_rng_state(), own / "rng.pt")
        if write_extra is not None:
            write_extra(own)
    dist.barrier()  # every rank's files are there

    def finish() -> None:
        if scheduler is not None and not only_model:
            torch.save(scheduler.state_dict(), temporary / "scheduler.pt")
        state = {"step": step, "world_size": dist.get_world_size(), "identity": identity, "progress": progress}
        (temporary / STATE).write_text(json.dumps(state, indent=2) + "\n")
        described = manifest(temporary)
        for path in temporary.rglob("*"):
            flush_to_disk(path)
        write_atomically(temporary / MANIFEST, json.dumps(described, indent=1) + "\n")
        if final.exists():  # an unreadable one, or one of a time line that was given up
            os.rename(final, folder / f".{final.name}.replaced")
        os.rename(temporary, final)
        flush_to_disk(folder)
        write_atomically(folder / POINTER, final.name + "\n")
        _prune(folder, final, save_total_limit)
        _clean_up(folder)

    on_first_rank(finish)
    return final


def _prune(folder: Path, newest: Path, limit: int | None) -> None:
    if limit is None:
        return
    others = [path for path in checkpoints(folder) if path != newest]
    others.sort(key=lambda path: (_step(path) < _step(newest), _step(path)))  # later steps: of a time line given up
    for old in others[: max(0, len(others) + 1 - max(1, limit))]:
        os.rename(old, folder / f".{old.name}.pruned")  # first out of sight: half a checkpoint must not bear the name


def load_checkpoint(
    checkpoint: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any = None
) -> dict[str, Any]:
    """Restore model, optimizer, schedule and random generators in place; returns the saved `progress`. A collective.

    Works with another number of ranks: tensors are resharded, and a rank without a saved generator gets one seeded from
    the step, its number and the first rank's generator.
    """
    folder = Path(checkpoint)
    saved = _saved(folder)
    state = _trained_state(model, optimizer)
    dcp.load(state, checkpoint_id=folder / "state")
    if _whole(model):
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    else:  # the parameters themselves were read into
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
    own = rank_folder(folder, dist.get_rank()) / "rng.pt"
    if own.is_file():
        _set_rng_state(torch.load(own, weights_only=True))
    else:
        _set_rng_state(torch.load(rank_folder(folder, 0) / "rng.pt", weights_only=True))
        seed = zlib.crc32(f"{saved['step']} {dist.get_rank()} {random.getrandbits(64)}".encode())
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)  # CUDA's too
    return saved["progress"]


def _trained_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Model and optimizer; of a model that is frozen in part (adapters), the trained parameters alone."""
    reshard(model)
    if _whole(model):
        model_state, optimizer_state = get_state_dict(model, optimizer)
        return {"model": model_state, "optimizer": optimizer_state}
    # Not the model's own state, in which quantised layers have entries that only they can load.
    trained = {hf_name(name): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {"model": trained, "optimizer": get_optimizer_state_dict(model, optimizer)}


def _whole(model: nn.Module) -> bool:
    return all(p.requires_grad for p in model.parameters())


def rank_folder(checkpoint: str | Path, rank: int) -> Path:
    """Where that rank's own files are. With another number of ranks, read those of every rank that was saved."""
    return Path(checkpoint) / f"rank-{rank:05d}"


def _saved(checkpoint: str | Path) -> dict[str, Any]:
    return json.loads((Path(checkpoint) / STATE).read_text())


def _rng_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (str(kind), [int(key) for key in keys], *rest)}
    state["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
