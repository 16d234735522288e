from tests import gpu_check


def test_all_parts_run_and_their_aims_end_in_one_table(tmp_path, capfd):
    line = "| met | speed | 2 | >= 1 |"
    parts = {
        name: (["timeit", "-n1", "-r1", statement], limit)
        for name, statement, limit in (
            ("fails", "print('| missed | size | 3 | <= 1 |'); 1 / 0", 30),
            ("hangs", "print('| odd | line |'); import time; time.sleep(60)", 1),
            ("prints", f"print('{line}')", 30),
        )
    }
    output = tmp_path / "made" / "table.md"
    assert gpu_check.check(parts, "H100, torch", output) == 1
    text = output.read_text()
    assert text.startswith("H100, torch\n") and capfd.readouterr().out.rstrip().endswith(text.rstrip())
    aims, ran = text.split("| python -m | s | |")
    assert aims.splitlines()[-3:-1] == ["| missed | size | 3 | <= 1 |", line] and "odd" not in aims
    assert [row.split(" | ")[-1] for row in ran.splitlines()[2:]] == ["exit code 1 |", "exit code -9 |", "ok |"]
    assert "| odd | line |" in output.with_suffix(".log").read_text()
