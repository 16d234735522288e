"""Helpers for the tests of eval's commands: write and read rows, expect a refusal, kill after the first file."""

import io
import json
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests import launch


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stones(answers: list[str], column: str = "answer") -> list[dict]:
    """One problem per answer."""
    return [
        {"problem": f"Ben has {10 + i} stones and finds {i} more.", column: answer} for i, answer in enumerate(answers)
    ]


def samples(output: Path, task: str = "aime24") -> list[dict]:
    """The rows that a run has written for a task."""
    return [row for file in sorted(output.glob(f"details/{task}/*.parquet")) for row in pq.read_table(file).to_pylist()]


def called(main: Callable[[list[str]], Any], argv: list[str]) -> tuple[int, str]:
    """Call `main` in this process; return its exit code and its output."""
    code, said = 0, io.StringIO()
    with redirect_stdout(said), redirect_stderr(said), launch.locks_released():
        try:
            main(argv)
        except SystemExit as stopped:
            code = 1 if isinstance(stopped.code, str) else stopped.code
            print(stopped.code)
    return code, said.getvalue()


def refused(main: Callable[[list[str]], Any], argv: list[str], capfd: pytest.CaptureFixture[str], says: str) -> None:
    """Check that `main` reports what is wrong with `argv` in one line and exits with code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and len(errors) == 1 and says in errors[0], errors


def killed_after_a_file(module: str, argv: list[str], output: Path, files: str, log: Path) -> dict[Path, int]:
    """Start a command and kill it when its first file exists. Returns the files written, with their times."""
    [process] = launch.start(module, argv, log)
    while not list(output.glob(files)):
        assert process.is_alive(), log.read_text()
        time.sleep(0.005)
    process.kill()
    process.join()
    return times(output, files)


def times(output: Path, files: str) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in output.glob(files)}
