"""The answer checker and the killable worker processes."""

import builtins
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.verify import Unscored, WorkerPool, check_answer, gold_is_parseable, parse_answer, parse_gold

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
# Workers import functions by name; `eval` of a string lets a test run anything in one.
run = builtins.eval


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(2, timeout=2.0) as pool:
        yield pool


def check(pool, golds, completions):
    tasks = [
        f"__import__('eval.verify').verify.check_answer({g!r}, {c!r})" for g, c in zip(golds, completions, strict=True)
    ]
    return pool.map(run, tasks)


# ------------------------------------------------------------------------------------------------ checking


@pytest.mark.parametrize(
    "completion",
    [
        r"\boxed{63}",
        r"so we get $\boxed{63}$ in all",
        "<answer>63</answer>",
        "<answer>\n 63 apples \n</answer>",
        r"<answer>\boxed{63}</answer>",
        "<answer>$63$</answer>",
        "48 + 15 = 63\n#### 63",
        "The answer is 63.",
        "The final answer is 63 apples, since 60 + 3 = 63 and 2 are left over.",
        "**Answer:** 63",
        "The answer is:\n$$\n63\n$$",
        "The answer to this question is 126/2",
        "$63$",
        "63",
        r"first \boxed{5}, no: \boxed{63}",
        r"cut off \boxed{63} and then \boxed{6",
        "<think>perhaps \\boxed{5}, the answer is 5</think> <answer>63</answer>",
        "<answer>1</answer> no, <answer>63.0</answer>",
        r"<answer>5</answer> or \boxed{63}",
    ],
)
def test_a_given_answer_is_found_wherever_it_is_marked(completion):
    assert check_answer("63", completion) == 1.0
    assert check_answer("$63$", completion) == 1.0
    assert check_answer("64", completion) == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "so she has 63 left",
        "To answer this, add 60 and 3 to get 63",
        r"<think>\boxed{63}</think>",
        r"<think>\boxed{63}</think> \boxed{64}",
        r"\boxed{6",
        "<answer></answer>",
        r"\boxed{}",
        r"<answer>63</answer> or \boxed{64}",
        "<answer>63x + 1</answer>",
        pytest.param(r"\boxed{63 " * 5000, id="boxes that never close: linear time"),
        pytest.param("<answer>63 " * 20000, id="tags that never close: linear time"),
    ],
)
def test_what_is_not_an_answer_does_not_count(completion):
    assert check_answer("63", completion) == 0.0


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        (r"\frac{63}{400}", r"\frac{63}{400}", 1.0),
        (r"\frac{63}{400}", r"\frac{64}{400}", 0.0),
        (r"$\frac{1}{2}$", "0.5", 1.0),
        ("1,234", "1234", 1.0),
        ("x^2+1", "1 + x^2", 1.0),
        ("2x+1", "2", 0.0),
        ("6", r"\boxed{3}", 0.0),
        (r"\text{Evelyn}", "Evelyn", 1.0),
        ("A", "A", 1.0),
        ("A", "B", 0.0),
        (r"\$18.90", "$18.9", 1.0),
        ("(1,2)", "1<x<2", 0.0),  # gold first: the other way round is allowed
        ("1<x<2", "(1,2)", 1.0),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", 1.0),
    ],
)
def test_equal_values(gold, answer, expected):
    assert check_answer(gold, f"<answer>{answer}</answer>") == expected


def test_unparseable_gold():
    assert not gold_is_parseable("no value here") and not gold_is_parseable("")
    assert gold_is_parseable("63") and gold_is_parseable(r"thus $\boxed{63}$.")
    assert check_answer("no value here", r"\boxed{63}") is None
    assert parse_gold("48/2 = <<48/2=24>>24 clips in May.\n#### 72")[0] == 72
    assert parse_answer("no value here") == []


def rows(name, count):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    with path.open() as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


def test_gsm8k_gold_against_itself_and_one_more(pool):
    answers = [row["answer"] for row in rows("gsm8k_train.jsonl", 200)]
    numbers = [answer.rpartition("####")[2].strip() for answer in answers]
    more = [str(int(number.replace(",", "")) + 1) for number in numbers]
    assert check(pool, answers, answers) == [1.0] * 200
    for template in ("<answer>{}</answer>", "\\boxed{{{}}}", "The answer is {}."):
        for values, expected in ((numbers, 1.0), (more, 0.0)):
            assert check(pool, answers, [template.format(value) for value in values]) == [expected] * 200


def test_math_500_solution_against_answer():
    for row in rows("math_500.jsonl", 100):
        for template in (r"so $\boxed{{{}}}$.", "<answer>{}</answer>", "So the answer is: {}"):
            assert check_answer(row["solution"], template.format(row["answer"])) == 1.0, row["answer"]


TRICKY = st.one_of(
    st.text(max_size=80),
    st.text("0123456789+-*/^=<>(){}[]$\\%.,# \nxe", max_size=40),
    st.lists(
        st.sampled_from(
            [r"\boxed{", "}", "<answer>", "</answer>", "####", "$", r"\frac", "{", "5", "answer is ", "\\"]
        ),
        max_size=12,
    ).map("".join),
)


@settings(max_examples=10, deadline=None)
@given(pairs=st.lists(st.tuples(TRICKY, TRICKY), min_size=20, max_size=20))
def test_no_text_raises(pool, pairs):
    for result in check(pool, *zip(*pairs, strict=True)):
        assert result in (0.0, 1.0, None) or result.reason == "timeout"


# ------------------------------------------------------------------------------------------------ workers


def test_what_hangs_crashes_or_raises_costs_only_itself(pool):
    tasks = {
        "6 * 7": 42,
        "[None for _ in iter(int, 1)]": "timeout",  # for ever, in Python
        "__import__('re').match('(a+)+$', 'a' * 60 + 'b')": "timeout",  # in C, holding the lock
        "3 ** (10 ** 10)": "timeout",
        "__import__('time').sleep(1000)": "timeout",
        "__import__('os')._exit(0)": "crash",
        "__import__('ctypes').string_at(0)": "crash",  # a segmentation fault
        "__import__('os').kill(__import__('os').getpid(), 9)": "crash",
        "'a' * (64 << 30)": "exception",  # memory
        "1 / 0": "exception",
        "__import__('sys').exit(3)": "exception",
        "lambda: 0": "exception",  # a result that does not pickle
        "print('noise') or __import__('os').write(1, b'noise')": 5,
    }
    results = pool.map(run, [*tasks, "7"])
    assert results.pop() == 7
    for (task, expected), result in zip(tasks.items(), results, strict=True):
        found = result.reason if isinstance(result, Unscored) else result
        assert found == expected, (task, result)
    by_task = dict(zip(tasks, results, strict=True))
    assert by_task["1 / 0"].error == "ZeroDivisionError: division by zero"
    assert "MemoryError" in by_task["'a' * (64 << 30)"].error
    assert pool.map(run, ["1", "2"]) == [1, 2]


def test_order_is_kept_with_any_number_of_workers(pool):
    with WorkerPool(1) as single:
        for count in (0, 1, 7, 300):
            items = [f"{i} * 2" for i in range(count)]
            assert pool.map(run, items) == single.map(run, items) == [2 * i for i in range(count)]


def test_an_item_may_have_its_own_limit(pool):
    naps = ["__import__('time').sleep(2) or 'slept'"] * 2
    slept, cut = pool.map(run, naps, timeouts=[60.0, 1.0])
    assert slept == "slept" and cut.reason == "timeout"


def test_workers_import_nothing_heavy_and_have_one_hash_seed(pool):
    heavy = "[m for m in ('torch', 'vllm', 'transformers') if m in __import__('sys').modules]"
    task = f"(__import__('grpo_core.rewards'), {heavy})[1]"
    assert pool.map(run, [task] * 8) == [[]] * 8
    assert len(set(pool.map(run, ["hash('a')"] * 8))) == 1


def test_imports_are_not_charged_and_their_failure_is_an_error(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "slow_import.py").write_text(
        "import os, time\ntime.sleep(float(os.environ['NAP']))\ndef f(x): return x"
    )
    monkeypatch.setenv("NAP", "0")
    import slow_import

    monkeypatch.setenv("NAP", "2")
    with WorkerPool(1, timeout=1.0) as pool:
        assert pool.map(slow_import.f, [1, 2]) == [1, 2]
    monkeypatch.setenv("NAP", "not a number")
    with WorkerPool(1) as pool:
        with pytest.raises(RuntimeError, match="cannot import.*could not convert"):
            pool.map(slow_import.f, [1])
        assert pool.map(abs, [-1]) == [1]
        with pytest.raises(ValueError, match="define it in a module"):
            pool.map(lambda x: x, [1])


def test_workers_ignore_the_signals_of_the_terminal_and_are_replaced_when_killed(pool):
    first = pool.map(run, ["__import__('os').getpid()"] * 40)
    for worker in set(first):
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM)
    assert set(pool.map(run, ["__import__('os').getpid()"] * 40)) <= {w.process.pid for w in pool._workers}
    survivors = {w.process.pid for w in pool._workers}
    assert set(first) <= survivors
    for worker in survivors:
        os.kill(worker, signal.SIGKILL)
    assert pool.map(run, ["1"] * 5) == [1] * 5
    assert survivors.isdisjoint(w.process.pid for w in pool._workers)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_parent_leaves_no_worker():
    code = (
        "import builtins, os, time; from eval.verify import WorkerPool\n"
        "pool = WorkerPool(2, timeout=1000)\n"
        "pool.map(abs, [1])\n"
        "fork = os.fork()\n"  # keeps the sockets open, as a library's own children may
        "while not fork: time.sleep(1)\n"
        "print(fork, *[w.process.pid for w in pool._workers], flush=True)\n"
        "pool.map(builtins.eval, ['1', '__import__(\"time\").sleep(1000)', '2'])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    fork, *workers = map(int, parent.stdout.readline().split())
    try:
        assert len(workers) == 2 and all(running(worker) for worker in workers)
        parent.kill()
        parent.wait()
        give_up = time.monotonic() + 60  # only so that a failure ends
        while any(running(worker) for worker in workers) and time.monotonic() < give_up:
            time.sleep(0.05)
        assert not any(running(worker) for worker in workers)
    finally:
        os.kill(fork, signal.SIGKILL)
