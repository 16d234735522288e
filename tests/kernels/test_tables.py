from kernels.tables import head, line, table


def test_a_table_at_once_has_aligned_columns():
    assert table(["name", "n"], [["a", 1], ["longer", None]]) == (
        "| name   | n    |\n| ------ | ---- |\n| a      | 1    |\n| longer | None |"
    )
    assert table(["only", "names"], []) == "| only | names |\n| ---- | ----- |"


def test_a_table_line_by_line_has_its_heading_first():
    assert [head("name", "n"), line("a", 1.5)] == ["| name | n |\n|---|---|", "| a | 1.5 |"]
