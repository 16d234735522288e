"""gen.folder and gen.store: the results in a folder do not change, whatever other runs write."""

import json

import pyarrow.parquet as pq
import pytest

from gen.client import Answer
from gen.config import GenerateConfig
from gen.folder import open_folder
from gen.store import Store, open_rows
from tests.launch import locks_released


@pytest.fixture(autouse=True)
def _locks():
    with locks_released():
        yield


def test_only_its_own_half_written_files_are_removed(tmp_path):
    half_written = [".train.parquet.7.tmp", "batches/.000001.parquet.7.tmp"]
    of_others = ["sft/.model.safetensors.7.tmp", "batches/sub/.x.parquet.7.tmp", "batches/000001.parquet"]
    for name in half_written + of_others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "settings.json").write_text(json.dumps({"seed": 1}))
    open_folder(tmp_path, {"seed": 1}, "batches/*.parquet")
    assert not any((tmp_path / name).exists() for name in half_written)
    assert all((tmp_path / name).exists() for name in of_others)


def test_a_batch_that_two_have_filled_has_each_row_once(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(3)))
    config = GenerateConfig(hf_dataset=str(data), model="m", output_dir=str(tmp_path / "out"))
    store = Store(config, open_rows(config))
    store.open()
    first, second = store.batch(0), store.batch(0)
    for batch, filled in ((first, (0, 1)), (second, (0, 1, 2))):
        for row in filled:
            batch.answers[row] = [Answer(text=f"{row}", tokens=1, prompt_tokens=1, finish_reason="stop")]
        store.write(batch)
    assert store.finish()["prompts"] == 3
    written = pq.read_table(store.folder / "train.parquet")
    assert written["generation"].to_pylist() == [["0"], ["1"], ["2"]]
