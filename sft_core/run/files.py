"""Files that survive kill -9: written whole, flushed to the disk, and known by size and checksum."""

import errno
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sft_core.run.options import require

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn what is raised inside for want of space on the disk into one line and exit code 1."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise SystemExit(f"error: {error.strerror}. Make room; the same command goes on from there.") from None


@contextmanager
def room_for(what: str, unfinished: Path, needed: int) -> Iterator[None]:
    """What fails inside for want of space becomes an OSError that says how many bytes are needed; the folder
    `unfinished`, which was written to, is removed."""
    try:
        yield
    except BaseException as error:  # as that of torch.distributed.checkpoint is
        free = shutil.disk_usage(unfinished.parent).free
        full = getattr(error, "errno", None) in FULL or any(os.strerror(number) in str(error) for number in FULL)
        if not full and (free >= needed or "inline_container" not in str(error)):  # torch's writer keeps no reason
            raise
        shutil.rmtree(unfinished, ignore_errors=True)
        free = shutil.disk_usage(unfinished.parent).free
        says = f"{what} takes about {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
        raise OSError(errno.ENOSPC, f"no space left in {unfinished.parent}: {says}") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """`with whole_file(path) as temporary`: what is written there becomes `path`, on the disk, or is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)
    except OSError as error:
        if error.errno not in FULL or not temporary.exists():
            raise
        size = temporary.stat().st_size / 1e6
        says = f"no space left in {path.parent}: {path.name} takes more than the {size:.1f} MB that were free"
        raise OSError(errno.ENOSPC, says) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Old content or new content, never half of it, whenever the process or the machine dies."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def keep_settings(folder: Path, settings: dict[str, Any], used: bool, option: str = "--output_dir") -> None:
    """Write settings.json, on which a folder's results depend; a folder that is `used`, and for others, is refused.

    `settings`: JSON-able. Raises ValueError, saying what differs; `option` is what the folder was named with.
    """
    file, remedy = folder / "settings.json", f"Choose another {option}."
    if used:
        try:
            theirs = json.loads(file.read_text())
            found = [(name, theirs.get(name), now) for name, now in settings.items()]
        except (OSError, ValueError, AttributeError):  # not there, damaged, or something else
            raise ValueError(f"{file} cannot be read, so whose results these are is not known. {remedy}") from None
        changed = "; ".join(f"{name} ({there}, now {now})" for name, there, now in found if there != now)
        require(not changed, f"{folder} holds results of other settings: {changed}. {remedy}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(settings, indent=1))


def check_writable(folder: str | Path, remedy: str = "Choose another --output_dir.") -> None:
    """Raises ValueError where `folder` cannot be made, or no file be made in it; leaves nothing."""
    path = Path(folder).absolute()
    try:
        tempfile.TemporaryFile(dir=next(there for there in (path, *path.parents) if there.exists())).close()
    except OSError as error:
        raise ValueError(f"cannot write to the folder {folder}: {error.strerror}. {remedy}") from error


def open_to_readers(folder: Path) -> None:
    """Give the weights in `folder` the mode that the umask gives a new file: safetensors writes 0600."""
    new = folder / f".{os.getpid()}.mode"
    new.touch()
    for weights in folder.glob("*.safetensors"):
        weights.chmod(new.stat().st_mode & 0o777)
    new.unlink()


def flush_to_disk(path: Path) -> None:
    """fsync a file's bytes, or a folder's entries (a rename is on the disk once its folder is)."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def describe(folder: Path, files: Iterable[Path]) -> dict[str, list[int]]:
    """{name in `folder`: [bytes, crc32]} of these files."""
    files = list(files)
    with ThreadPoolExecutor(8) as pool:  # crc32 and read release the interpreter's lock
        return {
            str(file.relative_to(folder)): found for file, found in zip(files, pool.map(_describe, files), strict=True)
        }


def _describe(file: Path) -> list[int]:
    crc, size = 0, 0
    with open(file, "rb") as content:
        while block := content.read(1 << 24):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]
