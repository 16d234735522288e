"""Checkpoints that survive kill -9 at any moment.

A checkpoint is either complete or absent. All files are written to `.checkpoint-<step>.tmp` and flushed to the disk.
The last file is a manifest with the size and checksum of each file. Then the folder is renamed to `checkpoint-<step>`,
and finally the file `latest` names it. Each rank flushes and checksums the files that it wrote. The folder contains:

    the model             a Hugging Face folder, written by the caller's `write_model`
    state/                the trained parameters, the optimizer, and a reference model that follows the policy, by
                          torch.distributed.checkpoint: loads with any number of ranks
    scheduler.pt          the schedule's state
    rank-00000/           that rank's random generators (rng.pt) and the files of the caller's `write_more`
    progress.json         step, world size, identity and the caller's `progress`, human-readable
    manifest.json         written last

Not supported, on purpose: asynchronous saving, and folders that the ranks do not share. Every rank calls, in order:

    checkpoint = prepare_output_dir(output_dir, identity, overwrite)  # run/output_dir.py, before weights are loaded
    trained = Trained(model, optimizer, scheduler)
    progress = load_checkpoint(checkpoint, trained) if checkpoint else {}
    save_checkpoint(output_dir, Record(step, progress, identity), trained, save_total_limit=2)
"""

import json
import os
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from sft_core.run.files import describe, flush_to_disk, write_atomically
from sft_core.run.output_dir import FORMAT, MANIFEST, POINTER, STATE, checkpoints, clean_up, read_state, step_of


@dataclass(frozen=True)
class Trained:
    """The objects that an optimizer step changes."""

    model: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any
    reference: Any = None  # a reference model that follows the policy, if there is one


@dataclass(frozen=True)
class Record:
    """The content of progress.json: JSON-able, the same on every rank."""

    step: int
    progress: dict[str, Any]  # `load_checkpoint` returns it
    identity: dict[str, Any]


def save_checkpoint(
    folder: Path,
    record: Record,
    trained: Trained | None,
    write_model: Callable[[Path], None] | None = None,
    write_more: Callable[[Path], None] | None = None,
    save_total_limit: int | None = None,
) -> Path:
    """Write `folder`/checkpoint-<step> and point `latest` to it; returns its path. A collective.

    `write_model(folder)` is called on every rank with the checkpoint's folder, `write_more(folder)` with the rank's own
    folder in it. Without `trained` the checkpoint holds only the model, and no run can resume from it. The oldest
    checkpoints beyond `save_total_limit` are removed, but never the new one or the progress's `best_checkpoint`.
    """
    rank, temporary = dist.get_rank(), folder / f".checkpoint-{record.step}.tmp"

    def start() -> None:
        clean_up(folder)
        temporary.mkdir(parents=True)

    on_first_rank(start)
    if write_model is not None:
        write_model(temporary)
    if trained is not None:
        dcp.save(_trained_state(trained), checkpoint_id=temporary / "state")
        mine = rank_folder(temporary, rank)
        mine.mkdir()
        torch.save(_rng_state(), mine / "rng.pt")
        if write_more is not None:
            write_more(mine)
        if rank == 0:
            torch.save(trained.scheduler.state_dict(), temporary / "scheduler.pt")
    if rank == 0:
        (temporary / STATE).write_text(
            json.dumps({"world_size": dist.get_world_size(), **vars(record)}, indent=2) + "\n"
        )
    written = [path for path in temporary.rglob("*") if path.is_file() and _writer(path.relative_to(temporary)) == rank]
    for path in {*written, *(path.parent for path in written)}:
        flush_to_disk(path)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, describe(temporary, written))
    files = {name: description for part in parts for name, description in part.items()}

    def complete() -> Path:
        write_atomically(temporary / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n")
        final = folder / f"checkpoint-{record.step}"
        if final.exists():  # it is unreadable, or the run resumed from an earlier checkpoint
            os.rename(final, folder / f".{final.name}.replaced")
        os.rename(temporary, final)
        flush_to_disk(folder)
        write_atomically(folder / POINTER, final.name + "\n")
        _prune(folder, final, record.progress.get("best_checkpoint", ""), save_total_limit)
        clean_up(folder)
        return final

    return on_first_rank(complete)


def _writer(file: Path) -> int:
    """The rank that writes this file of a checkpoint: the owner of its folder or shard, else the first rank."""
    own = re.match(r"rank-(\d+)/|state/__(\d+)_", file.as_posix())
    return int(own[1] or own[2]) if own else 0


def _prune(folder: Path, newest: Path, best: str, limit: int | None) -> None:
    if limit is None:
        return
    everything = checkpoints(folder)
    others = [path for path in everything if path.name not in (newest.name, Path(best).name)]
    others.sort(
        key=lambda path: (step_of(path) < step_of(newest), step_of(path))
    )  # later steps first: the run has resumed from before them
    for old in others[: max(0, len(everything) - max(1, limit))]:
        os.rename(old, folder / f".{old.name}.pruned")  # renamed first: a half-removed checkpoint must not be found


def load_checkpoint(checkpoint: Path, trained: Trained) -> dict[str, Any]:
    """Restore `trained` and the random generators in place; returns the saved `progress`. A collective.

    The number of ranks may differ from the saved run's: tensors are resharded, and a rank without saved generators
    seeds them from the step, its own number and the first rank's generator.
    """
    saved, model, optimizer = read_state(checkpoint), trained.model, trained.optimizer
    state = _trained_state(trained)
    dcp.load(state, checkpoint_id=checkpoint / "state")
    if _all_trained(model):
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    else:  # `dcp.load` has filled the parameters in place
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    trained.scheduler.load_state_dict(torch.load(checkpoint / "scheduler.pt", weights_only=True))
    generators = rank_folder(checkpoint, dist.get_rank()) / "rng.pt"
    if generators.is_file():
        _set_rng_state(torch.load(generators, weights_only=True))
    else:
        _set_rng_state(torch.load(rank_folder(checkpoint, 0) / "rng.pt", weights_only=True))
        seed = zlib.crc32(f"{saved['step']} {dist.get_rank()} {random.getrandbits(64)}".encode())
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)  # CUDA's too
    return saved["progress"]


def _trained_state(trained: Trained) -> dict[str, Any]:
    """The state of model and optimizer, and the parameters of a reference model that follows the policy. For a partly
    frozen model (adapters), only the trained parameters."""
    model, optimizer = trained.model, trained.optimizer
    if trained.reference is not None:
        reshard(trained.reference)
        parameters = {hf_name(name): p.detach() for name, p in trained.reference.named_parameters()}
        return _trained_state(replace(trained, reference=None)) | {"reference": parameters}
    reshard(model)
    if not optimizer.state:  # before the first step torch makes the state with a step count of 1
        get_optimizer_state_dict(model, optimizer)
        for state in optimizer.state.values():
            state["step"].zero_()
    if _all_trained(model):
        model_state, optimizer_state = get_state_dict(model, optimizer)
        return {"model": model_state, "optimizer": optimizer_state}
    # Not the model's state_dict, in which quantised layers have entries that only these layers can load.
    parameters = {hf_name(name): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {"model": parameters, "optimizer": get_optimizer_state_dict(model, optimizer)}


def _all_trained(model: nn.Module) -> bool:
    return all(p.requires_grad for p in model.parameters())


def rank_folder(checkpoint: Path, rank: int) -> Path:
    """The folder of that rank's own files. If the number of ranks has changed, read the folders of all saved ranks."""
    return checkpoint / f"rank-{rank:05d}"


def _rng_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (str(kind), [int(key) for key in keys], *rest),
        "torch": torch.get_rng_state(),
    }
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
