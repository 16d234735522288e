"""Files that are complete if they exist, and folders that belong to one set of settings."""

import pytest

from sft_core.run.files import keep_settings, whole_file


def test_a_file_is_whole_or_what_it_was(tmp_path):
    file = tmp_path / "rows.txt"
    file.write_text("old")
    with pytest.raises(RuntimeError), whole_file(file) as temporary:
        temporary.write_text("ne")
        raise RuntimeError("no more")
    assert file.read_text() == "old"
    with whole_file(file) as temporary:
        temporary.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.txt"] and file.read_text() == "new"


def test_a_folder_that_is_used_keeps_its_settings(tmp_path):
    folder = tmp_path / "out"
    keep_settings(folder, {"seed": 1}, used=False)
    keep_settings(folder, {"seed": 1}, used=True)
    with pytest.raises(ValueError, match=r"out holds results of other settings: seed \(1, now 2\). Choose another --o"):
        keep_settings(folder, {"seed": 2}, used=True)
    keep_settings(folder, {"seed": 2}, used=False)  # nothing depends on the old ones
    keep_settings(folder, {"seed": 2}, used=True)
    for damaged in ('{"seed"', "[2]"):
        (folder / "settings.json").write_text(damaged)
        with pytest.raises(ValueError, match="settings.json cannot be read.*Choose another --output-dir"):
            keep_settings(folder, {"seed": 2}, used=True, option="--output-dir")
