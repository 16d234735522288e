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

FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)]


def is_full(error: BaseException) -> bool:
    """Whether it was raised for want of space on the disk. An error that is no OSError may say so in its text."""
    return any(reason in str(error) for reason in FULL)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn an OSError that is raised inside for want of space on the disk into one line and exit code 1."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise SystemExit(f"error: {error}. Make room; the same command goes on from there.") from None


@contextmanager
def room_for(what: str, folder: str, needed: int) -> Iterator[None]:
    """What fails inside for want of space on the disk becomes an OSError that says how many bytes are needed, about."""
    try:
        yield
    except BaseException as error:  # as that of torch.distributed.checkpoint is
        no_reason = "inline_container" in str(error)  # torch's writer gives none
        if not is_full(error) and not (no_reason and shutil.disk_usage(folder).free < needed):
            raise
        raise OSError(f"{FULL[0]}: {what} in {folder} takes about {needed / 1e6:.1f} MB") from error


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
        error.filename = error.filename or str(path)  # an error of a write names none
        raise
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
        shutil.copymode(new, weights)
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
