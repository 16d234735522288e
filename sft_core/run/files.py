"""Writes files that survive kill -9: complete, flushed to the disk, and identified by size and checksum."""

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
    """Whether the error was raised because the disk is full. An error of another type may say so in its text."""
    return any(reason in str(error) for reason in FULL)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn an OSError that is raised inside because the disk is full into one line and exit code 1."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise SystemExit(f"error: {error}: free some space, then run the same command to resume.") from None


@contextmanager
def room_for(what: str, folder: str, needed: int) -> Iterator[None]:
    """Turn a failure inside because the disk is full into an OSError that says about how many bytes are needed."""
    try:
        yield
    except BaseException as error:  # torch.distributed.checkpoint's exception is not an Exception
        no_reason = "inline_container" in str(error)  # torch's writer gives no reason
        if not is_full(error) and not (no_reason and shutil.disk_usage(folder).free < needed):
            raise
        raise OSError(f"{FULL[0]}: {what} in {folder} takes about {needed / 1e6:.1f} MB") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """`with whole_file(path) as temporary`: the file written at `temporary` replaces `path`, or is removed on error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # an error of a write names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that the file has its old or its new content if the process or the machine dies."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def keep_settings(folder: Path, settings: dict[str, Any], used: bool, option: str = "--output_dir") -> None:
    """Write settings.json, on which a folder's results depend; refuse a `used` folder with other settings.

    `settings`: JSON-able. `option`: the option that names the folder. Raises ValueError, which lists the differences.
    """
    file, remedy = folder / "settings.json", f"Choose another {option}."
    if used:
        try:
            theirs = json.loads(file.read_text())
            found = [(name, theirs.get(name), now) for name, now in settings.items()]
        except (OSError, ValueError, AttributeError):  # missing, damaged, or another kind of file
            raise ValueError(f"{file} cannot be read, so the settings of its results are unknown. {remedy}") from None
        changed = "; ".join(f"{name} ({there}, now {now})" for name, there, now in found if there != now)
        require(not changed, f"{folder} holds results of other settings: {changed}. {remedy}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(settings, indent=1))


def check_writable(folder: str | Path, remedy: str = "Choose another --output_dir.") -> None:
    """Raise ValueError if `folder`, or a file in it, cannot be made. Nothing is left behind."""
    path = Path(folder).absolute()
    try:
        tempfile.TemporaryFile(dir=next(there for there in (path, *path.parents) if there.exists())).close()
    except OSError as error:
        raise ValueError(f"cannot write to the folder {folder}: {error.strerror}. {remedy}") from error


def open_to_readers(folder: Path) -> None:
    """Give the weights in `folder` the mode of a new file under the umask, because safetensors writes them as 0600."""
    new = folder / f".{os.getpid()}.mode"
    new.touch()
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(new, weights)
    new.unlink()


def flush_to_disk(path: Path) -> None:
    """fsync a file's bytes or a folder's entries. A rename is on the disk only after its folder is flushed."""
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
