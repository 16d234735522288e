import re
import subprocess
import sys

import pytest

from tests import gpu_check
from tests.commands import ROOT, environment
from tests.gpu_check import PARTS, STEPS, Step, check, chosen

ABSENT = (
    "datasets",
    "math_verify",
    "latex2sympy2_extended",
    "latex2mathml",
    "vllm",
    "trl",
    "peft",
    "hypothesis",
    "pyarrow",
    "pandas",
    "aiohttp",
    "xdist",
)
BENCHES = ["tests.aims", "grpo_core.bench", "sft_core.bench", "kernels.bench", "tests.aims", "tests.e2e.beside_trl"]


def timeit(part, statement, limit=30):
    return Step(part, ["timeit", "-n1", "-r1", statement], limit)


def test_all_parts_run_and_their_aims_end_in_one_table(tmp_path, capfd):
    line = "| met | speed | 2 | >= 1 |"
    steps = [
        timeit("fails", "print('| missed | size | 3 | <= 1 |'); 1 / 0"),
        timeit("hangs", "print('| odd | line |'); import time; time.sleep(60)", 1),
        timeit("prints", f"import os; print(os.environ['VLLM_NO_USAGE_STATS']); print('{line}')"),
        Step("tests", ["pytest", "--version"], 30),
    ]
    output = tmp_path / "made" / "table.md"
    assert check(steps, "H100, torch", output) == 1
    text = output.read_text()
    assert text.startswith("H100, torch\n") and capfd.readouterr().out.rstrip().endswith(text.rstrip())
    aims, ran = text.split("| python -m | s | |")
    assert aims.splitlines()[-3:-1] == ["| missed | size | 3 | <= 1 |", line] and "odd" not in aims
    ends = [row.split(" | ")[-1] for row in ran.splitlines()[2:]]
    assert ends == ["exit code 1 |", "exit code -9 |", "ok |", f"ok: pytest {pytest.__version__} |"]
    assert "| odd | line |" in output.with_suffix(".log").read_text()


def test_the_table_and_the_log_are_there_while_a_part_runs(tmp_path, capfd):
    output = tmp_path / "table.md"
    read = (
        f"print('| met | speed | 2 | >= 1 |'); time.sleep(1); print('LOG', open('{output.with_suffix('.log')}').read())"
    )
    steps = [timeit("first", f"import time; {read}; print('TABLE', open('{output}').read())"), timeit("second", "1")]
    assert check(steps, "H100", output) == 0
    log, table = capfd.readouterr().out.split("LOG H100")[1].split("TABLE H100")[:2]
    assert "| met | speed |" in log and "| met | speed |" in table
    assert [row.split(" | ")[-1] for row in table.splitlines() if "timeit -n1" in row][:2] == [
        "running |",
        "not run yet |",
    ]


def test_parts_run_in_the_order_given_and_once():
    assert [step.part for step in chosen(["sft", "tests", "sft"], True)] == ["sft", "tests", "tests"]
    assert chosen(PARTS, True) == STEPS
    alone = [step.command for step in STEPS if gpu_check.BLOCKS in step.command and step.part == "tests"]
    assert len(alone) == 1 and "-n" not in alone[0] and not set(alone[0]) & set(gpu_check.OTHERS)


def test_without_a_gpu_it_is_a_rehearsal(tmp_path):
    for step in chosen(PARTS, False):  # tests are skipped, kernels.bench is tiny by itself
        assert {"pytest", "kernels.bench", "tiny", "MODEL"} & set(step.command), step
        assert "1.5b" not in step.command and "--torch_compile" not in " ".join(step.command)
    output = tmp_path / "table.md"
    assert check([Step("tests", ["pytest", "--version"], 30)], "CPU", output, on_gpu=False) == 0
    assert f"| needs a GPU: pytest {pytest.__version__} |" in output.read_text()


REHEARSAL = f"""
import importlib, sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
without = lambda cls, name, *rest: None if name.split(".")[0] in {ABSENT} else find(name, *rest)
PathFinder.find_spec = classmethod(without)
for name in {ABSENT}:
    assert importlib.util.find_spec(name) is None
import pytest

for module in {BENCHES}:
    importlib.import_module(module)
plugins = ["-p", "no:hypothesispytest", "-p", "no:xdist", "-p", "no:xdist.looponfail", "-p", "no:cacheprovider"]
sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", *plugins, "tests/kernels", *sys.argv[1:]]))
"""


def test_what_runs_on_a_gpu_is_imported_without_what_it_does_not_need():
    """GPU tests and benches import only torch, triton, transformers and their requirements, but not datasets."""
    command = [sys.executable, "-c", REHEARSAL, *gpu_check.GPU_TESTS]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (
        "kernels/test_rows.py",
        "sft_core/test_compile.py",
        "gen/test_vllm_engine.py::test_sleep",
        "e2e/test_gpu.py",
    ):
        assert f"tests/{name}" in done.stdout


def test_processes_of_tests_keep_pythonpath_and_have_a_port_of_their_own():
    """Only `tests/commands.py` sets PYTHONPATH and defines how torchrun is started."""
    for path in (ROOT / "tests").rglob("*.py"):
        if path.name not in ("commands.py", "test_gpu_check.py", "beside_distilabel.py"):  # the last one takes it away
            assert not re.search("PYTHONPATH|torch.distributed.run\\b", path.read_text()), path
