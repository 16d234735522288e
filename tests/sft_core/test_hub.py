"""What is pushed to the Hub, checked with the real client and a server on the loopback; and the model card."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from sft_core.run.config import ModelConfig, ScriptArguments, SFTConfig
from sft_core.run.hub import PushToHub, Uploader, check_hub, model_repository, push_final, stage
from sft_core.run.model_card import write_model_card
from tests.hub_server import HubServer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as server:
        server.take_over(monkeypatch)
        yield server


@pytest.fixture
def config(tmp_path):
    return lambda **options: SFTConfig(
        output_dir=str(tmp_path / "out"), **{"push_to_hub": True, "hub_model_id": "me/m", **options}
    )


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def checkpoint(folder, step):
    """A checkpoint with the files of save_checkpoint, whose bytes depend on the step."""
    return write(
        folder / f"checkpoint-{step}",
        model_dot_safetensors=os.urandom(3000) + bytes([step]),
        config_dot_json="{}",
        trainer_state_dot_json="{}",
        state__dcp="x",
        scheduler_dot_pt="x",
        progress_dot_json="{}",
        manifest_dot_json="{}",
        **{"rank-00000__rng_dot_pt": "x"},
    )


def test_every_save_pushes_the_model_alone_and_outlives_pruning(hub, config, tmp_path):
    check_hub(config())
    pushes = PushToHub(config())
    folder = checkpoint(tmp_path / "out", 1)
    model = (folder / "model.safetensors").read_bytes()
    hub.fail_next(503, times=2, path="/commit/")
    pushes.waits_s = (0.01, 0.01)
    pushes.on_save(1, folder)
    for path in folder.rglob("*"):
        path.unlink() if path.is_file() else None  # like save_total_limit, at the worst moment
    assert pushes.close() == [] and not pushes.busy
    assert hub.repos["me/m"].files() == {"model.safetensors": model, "config.json": b"{}", "trainer_state.json": b"{}"}
    assert sum("/commit/" in path for _, path in hub.requests) == 3
    assert not list((tmp_path / "out").glob(".upload-*"))


@pytest.mark.parametrize("strategy, folder", [("checkpoint", "last-checkpoint"), ("all_checkpoints", "checkpoint-2")])
def test_whole_checkpoints_are_pushed_beside_the_model(hub, config, tmp_path, strategy, folder):
    options = config(hub_strategy=strategy, hub_always_push=True, hub_model_id="m")
    check_hub(options)
    pushes = PushToHub(options)
    for step in (1, 2):
        pushes.on_save(step, checkpoint(tmp_path / "out", step))
    assert pushes.close() == []
    asked = [path for _, path in hub.requests]
    assert asked.count("/api/repos/create") == 1  # once in the whole run
    files = hub.repos["me/m"].files()
    whole = {
        str(p.relative_to(tmp_path / "out/checkpoint-2")): p.read_bytes()
        for p in (tmp_path / "out/checkpoint-2").rglob("*")
        if p.is_file()
    }
    assert {name.removeprefix(f"{folder}/"): data for name, data in files.items() if name.startswith(folder)} == whole
    assert files["model.safetensors"] == whole["model.safetensors"] and "scheduler.pt" not in files
    assert not list((tmp_path / "out").glob(".upload-*"))


def test_final_push_leaves_out_what_is_the_runs_and_old_shards(hub, config, tmp_path):
    out = write(
        tmp_path / "out",
        model_dot_safetensors=os.urandom(99),
        README_dot_md="---\ntags: [a]\n---\n",
        runs__events="e",
        _dot_lock="x",
        wandb__a="x",
        rollouts__a_dot_parquet="x",
        latest="checkpoint-1",
        **{"previous-1__config_dot_json": "x", "benchmarks__s__previous-1__a": "x", "benchmarks__s___dot_lock": "x"},
    )
    checkpoint(out, 1)
    options = config(push_to_hub_revision=True, hub_model_revision="v1", hub_private_repo=True)
    check_hub(options)
    repo = hub.repos["me/m"]
    shards = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "notes.md": b"kept"}
    repo.commit("main", shards, "by hand")
    assert push_final(options, out) == []
    expected = {str(p.relative_to(out)): p.read_bytes() for p in (out / "model.safetensors", out / "README.md")}
    assert repo.files("main") == expected | {"notes.md": b"kept"}
    assert repo.files("v1") == expected  # from the first commit, without files of main
    assert [title for _, title in repo.history("v1")] == ["End of training", "initial commit"]
    assert repo.private


def test_what_fails_for_good_is_a_warning_and_the_next_goes_on(hub, config, tmp_path, caplog):
    check_hub(config())
    uploader = Uploader(config())
    uploader.waits_s = (0.01, 0.01)
    first, second = (write(tmp_path / name, config_dot_json=name) for name in "ab")
    hub.fail_next(500, times=3, path="/commit/")
    uploader.start(first, "first", remove=True)
    uploader.start(second, "second", remove=True)
    [failure] = uploader.close()
    assert failure.startswith("first, to branch main:") and "500" in failure
    assert any(failure in record.message for record in caplog.records)
    assert hub.repos["me/m"].files() == {"config.json": b"b"}
    assert not first.exists() and not second.exists()


def test_a_branch_with_a_model_is_not_overwritten_unasked(hub, config):
    check_hub(config(push_to_hub=False))
    assert not hub.requests
    asked = dict(hub_model_revision="v1", push_to_hub_revision=True)
    check_hub(config(**asked))  # no such branch
    hub.repos["me/m"].commit("v1", {"config.json": b""}, "no card")
    check_hub(config(**asked))
    hub.repos["me/m"].commit("v1", {"README.md": b""}, "a card")
    with pytest.raises(ValueError, match="v1 of me/m .*--hub_model_revision.*--overwrite_hub_revision"):
        check_hub(config(**asked))
    check_hub(config(**asked, overwrite_hub_revision=True))
    check_hub(config(hub_model_revision="v1"))  # push_to_hub alone goes to main
    check_hub(config(hub_model_revision="v1", callbacks=["push_to_hub_revision"]))  # the callback goes to branches


def test_names_and_refusals(hub, config):
    hub.fail_next(503)
    with pytest.raises(ValueError, match="503"):
        check_hub(config())
    check_hub(config())
    assert model_repository(config(hub_model_id=None)) == "me/out"
    assert model_repository(config(hub_model_id="x")) == "me/x"
    with pytest.raises(ValueError, match="--hub_model_id"):
        check_hub(config(hub_model_id="a b"))
    with pytest.raises(ValueError, match="others/m .*403.*--hub_model_id.*write"):
        check_hub(config(hub_model_id="others/m"))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"HF_TOKEN": ""}, "hf auth login.*HF_TOKEN"),
        ({"HF_TOKEN": "wrong"}, "Invalid.*hf auth login"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "127.0.0.1:9 does not accept.*HF_ENDPOINT"),
        ({}, None),
    ],
)
def test_the_environment_is_the_clients(change, says):
    code = (
        "from sft_core.run.config import SFTConfig; from sft_core.run.hub import check_hub; "
        "check_hub(SFTConfig(output_dir='/tmp/o', push_to_hub=True))"
    )
    with HubServer() as hub:
        environment = os.environ | hub.environment() | change
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        if says is None:
            assert done.returncode == 0 and "me/o" in hub.repos, done.stderr
        else:
            assert done.returncode == 1 and not hub.repos
            last = done.stderr.strip().splitlines()[-1]
            assert last.startswith("ValueError: ") and re.search(says, last), done.stderr


def test_what_a_killed_run_left_is_removed(tmp_path):
    write(tmp_path / ".upload-deadbeef-1", model="x")
    mine = stage(checkpoint(tmp_path, 1), ["state"])
    again = stage(tmp_path / "checkpoint-1")
    assert sorted(tmp_path.glob(".upload-*")) == sorted([mine, again])
    assert not (mine / "state").exists() and (again / "state").exists()
    assert os.path.samefile(mine / "config.json", tmp_path / "checkpoint-1/config.json")  # no bytes were copied


def test_model_card(hub, config, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    run = SimpleNamespace(
        algorithm="grpo",
        model=ModelConfig(model_name_or_path="Qwen/Q"),
        world_size=8,
        recipe="learning_rate: 1e-06\n",
        data=ScriptArguments(dataset_mixture={"datasets": [{"id": "open-r1/a"}, {"id": str(tmp_path)}]}),
        config=config(),
    )
    figures = {"train_loss": 0.25, "train_samples": 12.0, "benchmarks/math_500/pass@1": 0.5}
    write_model_card(out, run, figures)
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "Qwen/Q" and card.data.datasets == ["open-r1/a"]  # a folder is not a Hub id
    assert card.data.tags == ["open-r1", "grpo_core", "grpo"] and card.data.to_dict()["library_name"] == "transformers"
    [result] = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("math_500", "pass@1", 0.5)
    command = "torchrun --nproc_per_node 8 -m grpo_core.train --config recipe.yaml"
    table = ("| math_500 | pass@1 | 0.5 |", "| train_samples | 12 |")
    for text in (*table, "learning_rate: 1e-06", str(tmp_path), command):
        assert text in re.sub(" +", " ", card.text), text
    check_hub(run.config)
    assert push_final(run.config, out) == []  # the Hub's own check of the head
    write_model_card(out, run, figures | {"train_samples": 13.0})
    assert re.search(r"train_samples *\| 13 ", (out / "README.md").read_text())  # our card is rewritten
    (out / "README.md").write_text("mine")
    write_model_card(out, run, figures)
    assert (out / "README.md").read_text() == "mine"
