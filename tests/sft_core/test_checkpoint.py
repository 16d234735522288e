import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sft_core.model.checkpoint import Record, Trained, load_checkpoint, save_checkpoint
from sft_core.run import output_dir
from sft_core.run.distributed import init_distributed, shutdown
from sft_core.run.output_dir import checkpoints, prepare_output_dir
from tests.commands import TORCHRUN, environment
from tests.processes import run_ranks, start

IDENTITY = {"algorithm": "grpo", "model": "tiny", "seed": 1}


def make(tied):
    """A sharded tiny Llama in a policy, AdamW with moments, and a schedule."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(  # 30 does not divide evenly: the ranks' shards differ
        vocab_size=96, hidden_size=30, intermediate_size=45, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    policy = nn.Module()
    policy.model = LlamaForCausalLM(config)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in policy.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    matrices = [p for p in policy.parameters() if p.ndim > 1]
    vectors = [p for p in policy.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return policy, optimizer, scheduler


def update(policy, optimizer, scheduler, steps):
    for step in range(steps):
        for parameter in policy.parameters():
            parameter.grad = parameter.detach() * (0.3 + step)
        optimizer.step()
        scheduler.step()


def everything(policy, optimizer, scheduler):
    """Full parameters and moments by name, step counts, learning rates and the schedule."""
    full = {}
    for name, parameter in policy.named_parameters():
        full[name] = parameter.detach().full_tensor().numpy().copy()
        for key, value in optimizer.state[parameter].items():
            full[f"{name}.{key}"] = (value.full_tensor() if isinstance(value, DTensor) else value).numpy().copy()
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return full, options, scheduler.state_dict()


def assert_same(left, right):
    assert left[0].keys() == right[0].keys() and len(left[0]) > 20
    for name, tensor in left[0].items():
        assert tensor.dtype == right[0][name].dtype and np.array_equal(tensor, right[0][name]), name
    assert left[1:] == right[1:]


def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


def save_tiny(folder, tied, step, resume_from=None):
    """Create or resume a run, do two updates, and save. Returns what a resume should restore."""
    rank, *_ = init_distributed(60)
    made = make(tied)
    if resume_from is not None:
        load_checkpoint(resume_from, Trained(*made))
    update(*made, steps=2)
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    save_checkpoint(
        folder,
        Record(step, {"cursor": [step, 0.1], "loss": 1 / 3}, IDENTITY),
        Trained(*made),
        write_more=lambda own: (own / "rollouts.json").write_text(f"pending of {rank}"),
    )
    result = everything(*made), draws()
    shutdown()
    return result


def load_tiny(folder, tied):
    init_distributed(60)
    made = make(tied)
    checkpoint = prepare_output_dir(folder, IDENTITY, overwrite=False)
    progress = load_checkpoint(checkpoint, Trained(*made))
    result = checkpoint.name, progress, everything(*made), draws()
    shutdown()
    return result


def test_resharding_from_two_ranks_of_torchrun_to_one(tmp_path):
    subprocess.run([*TORCHRUN, "2", __file__, str(tmp_path)], env=environment(), check=True, timeout=300)
    saved, drawn = torch.load(tmp_path / "expected-0.pt", weights_only=False)
    (name, progress, loaded, redrawn), *_ = run_ranks(1, load_tiny, tmp_path, True)
    assert name == "checkpoint-7" and progress == {"cursor": [7, 0.1], "loss": 1 / 3}
    assert_same(saved, loaded)
    assert redrawn == drawn
    for rank in range(2):
        assert (tmp_path / name / f"rank-0000{rank}" / "rollouts.json").read_text() == f"pending of {rank}"
    described = json.loads((tmp_path / name / "manifest.json").read_text())["files"]
    files = {str(p.relative_to(tmp_path / name)) for p in (tmp_path / name).rglob("*") if p.is_file()}
    assert described.keys() == files - {"manifest.json"}  # each is described by the rank that wrote it
    state = json.loads((tmp_path / name / "progress.json").read_text())
    assert state["identity"] == IDENTITY and state["step"] == 7 and state["world_size"] == 2


def test_resharding_from_one_rank_to_two_and_on(tmp_path):
    ((saved, drawn),) = run_ranks(1, save_tiny, tmp_path, False, 7)
    twice = [run_ranks(2, load_tiny, tmp_path, False) for _ in range(2)]
    for results in twice:
        for _, _, loaded, _ in results:
            assert_same(saved, loaded)
    first, second = twice[0][0][3], twice[0][1][3]
    assert first == drawn and second != drawn  # the new rank draws other numbers,
    assert second == twice[1][1][3]  # the same ones at every resume
    on_two = run_ranks(2, save_tiny, tmp_path, False, 9, tmp_path / "checkpoint-7")
    ((name, _, loaded, _),) = run_ranks(1, load_tiny, tmp_path, False)
    assert name == "checkpoint-9"
    assert_same(on_two[0][0], loaded)


# --- kill -9 -----------------------------------------------------------------------------------------------------


def small(step):
    """A sharded layer and its optimizer, with all numbers derived from `step`."""
    model = nn.Linear(300, 300, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    with torch.no_grad():
        model.weight.fill_(step)
        optimizer.state[model.weight]["exp_avg"].fill_(2 * step)
    return Trained(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))


def save_small(folder, step, limit=None):
    save_checkpoint(folder, Record(step, {"step": step}, IDENTITY), small(step), save_total_limit=limit)


def save_forever(folder):
    init_distributed(60)
    checkpoint = prepare_output_dir(folder, IDENTITY, overwrite=False)
    step = load_checkpoint(checkpoint, small(0))["step"] if checkpoint else 0
    while True:
        step += 1
        save_small(folder, step, 2)
        (folder / "done").write_text(str(step))


def load_small(folder):
    init_distributed(60)
    checkpoint = prepare_output_dir(folder, IDENTITY, overwrite=False)
    if checkpoint is None:
        return "checkpoint-0", 0, {0.0}, {0.0}
    trained = small(0)
    step = load_checkpoint(checkpoint, trained)["step"]
    weight = trained.model.weight
    moments = trained.optimizer.state[weight]["exp_avg"].full_tensor()
    return checkpoint.name, step, set(weight.full_tensor().flatten().tolist()), set(moments.flatten().tolist())


def test_kill_nine_at_any_moment_leaves_what_was_saved(tmp_path):
    generator, reached, interrupted = random.Random(7), 0, 0
    for _ in range(6):
        process = start(save_forever, tmp_path)
        deadline = time.monotonic() + 60
        while not any(path.is_dir() for path in tmp_path.glob(".checkpoint-*.tmp")):
            assert process.is_alive() and time.monotonic() < deadline
        time.sleep(generator.uniform(0, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        reached = max(reached, int((tmp_path / "done").read_text() or 0) if (tmp_path / "done").exists() else 0)
        interrupted += any(tmp_path.glob(".checkpoint-*"))
        ((name, step, weights, moments),) = run_ranks(1, load_small, tmp_path)
        assert step >= reached and name == f"checkpoint-{step}"
        assert weights == {step} and moments == {2 * step}
        assert not any(tmp_path.glob(".checkpoint-*"))
        assert len(checkpoints(tmp_path)) <= 3  # the limit of 2, and one that was complete but not yet referenced
        reached = step
    assert interrupted > 0, "no kill hit a save: the test showed nothing"


def save_steps(folder, steps, limit=None):
    init_distributed(60)
    prepare_output_dir(folder, IDENTITY, overwrite=False)
    for step in steps:
        save_small(folder, step, limit)


@pytest.fixture(scope="module")
def three_saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run_ranks(1, save_steps, folder, [5, 10, 15])
    return folder


def find(folder):
    """The name of the checkpoint from which a run would resume."""
    return output_dir.find_checkpoint(folder)[0].name


@pytest.fixture
def saved(three_saved, tmp_path):
    return Path(shutil.copytree(three_saved, tmp_path / "run"))


def weights_file(checkpoint):
    return max((checkpoint / "state").glob("*.distcp"), key=lambda path: path.stat().st_size)


def truncate(checkpoint):
    os.truncate(weights_file(checkpoint), 1000)
    return "bytes, crc32"


def flip_a_byte(checkpoint):
    content = bytearray(weights_file(checkpoint).read_bytes())
    content[len(content) // 2] ^= 1
    weights_file(checkpoint).write_bytes(content)
    return "damaged"


def lose_a_file(checkpoint):
    (checkpoint / "rank-00000" / "rng.pt").unlink()
    return "rng.pt is missing"


def lose_the_manifest(checkpoint):
    (checkpoint / "manifest.json").unlink()
    return "manifest.json is missing"


def garble_the_manifest(checkpoint):
    os.truncate(checkpoint / "manifest.json", 20)
    return "manifest.json is damaged"


def be_of_another_version(checkpoint):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest["files"]))  # like the first format
    return f"its format is 1, this version reads {output_dir.FORMAT}"


DAMAGES = [truncate, flip_a_byte, lose_a_file, lose_the_manifest, garble_the_manifest, be_of_another_version]


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_unreadable_checkpoint_is_reported_and_the_one_before_it_is_used(saved, damage, capsys):
    reason = damage(saved / "checkpoint-15")
    assert prepare_output_dir(saved, IDENTITY, overwrite=False) == saved / "checkpoint-10"
    said = capsys.readouterr().out
    assert "checkpoint-15 is unreadable" in said and reason in said


def test_a_run_goes_on_over_an_unreadable_checkpoint(saved):
    flip_a_byte(saved / "checkpoint-15")
    run_ranks(1, save_steps, saved, [12, 15], 2)
    assert [path.name for path in checkpoints(saved)] == ["checkpoint-12", "checkpoint-15"]
    assert find(saved) == "checkpoint-15"


def test_no_readable_checkpoint_is_an_error_not_a_new_start(saved):
    for checkpoint in checkpoints(saved):
        truncate(checkpoint)
    with pytest.raises(ValueError, match="no checkpoint in .* is readable .*--overwrite_output_dir"):
        prepare_output_dir(saved, IDENTITY, overwrite=False)
    assert prepare_output_dir(saved, IDENTITY, overwrite=True) is None
    assert len(checkpoints(saved / "previous-1")) == 3


def test_the_pointer_decides_and_is_not_needed(saved):
    (saved / "latest").write_text("checkpoint-10\n")
    assert find(saved) == "checkpoint-10"
    (saved / "latest").write_bytes(b"\xff\0")
    assert find(saved) == "checkpoint-15"
    (saved / "latest").unlink()
    assert find(saved) == "checkpoint-15"


def test_leftovers_of_a_killed_save_are_finished_or_undone(saved):
    shutil.copytree(saved / "checkpoint-10", saved / ".checkpoint-20.tmp")
    os.rename(saved / "checkpoint-15", saved / ".checkpoint-15.replaced")
    os.rename(saved / "checkpoint-5", saved / ".checkpoint-5.pruned")
    assert find(saved) == "checkpoint-15"
    assert [path.name for path in checkpoints(saved)] == ["checkpoint-10", "checkpoint-15"]
    assert not any(saved.glob(".checkpoint-*"))


@pytest.mark.parametrize("lost", [(), ("run.json",)])  # a checkpoint itself identifies its run
def test_own_checkpoints_resume_and_others_are_refused_or_moved_aside(saved, lost):
    for overwrite in (False, True):
        assert prepare_output_dir(saved, IDENTITY, overwrite) == saved / "checkpoint-15"
    for name in lost:
        (saved / name).unlink()
    (saved / "metrics.jsonl").write_text("{}\n")
    before = sorted(path.relative_to(saved) for path in saved.rglob("*") if path.is_file())
    other = IDENTITY | {"seed": 2, "data": "abc"}
    with pytest.raises(ValueError, match="seed is 1 there, 2 here; data is None there, 'abc' here.*--overwrite_output"):
        prepare_output_dir(saved, other, overwrite=False)
    assert sorted(path.relative_to(saved) for path in saved.rglob("*") if path.is_file()) == before
    (saved / ".lock").touch()
    assert prepare_output_dir(saved, other, overwrite=True) is None
    aside = saved / "previous-1"
    assert sorted(path.relative_to(aside) for path in aside.rglob("*") if path.is_file()) == before
    assert {path.name for path in saved.iterdir()} == {".lock", "run.json", "previous-1"}
    (saved / "model.safetensors").touch()  # the second run's result
    assert prepare_output_dir(saved, IDENTITY, overwrite=True) is None
    assert (saved / "previous-2" / "model.safetensors").exists() and len(checkpoints(aside)) == 3


def test_save_total_limit_prunes_the_oldest(tmp_path):
    run_ranks(1, save_steps, tmp_path, [9, 10, 11, 100], 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-11", "checkpoint-100"]
    assert (tmp_path / "latest").read_text() == "checkpoint-100\n"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-11", "checkpoint-100", "latest", "run.json"}


if __name__ == "__main__":  # one rank of the torchrun test
    output_dir = Path(sys.argv[1])
    if os.environ["RANK"] == "0":  # there is no process group yet to coordinate this
        prepare_output_dir(output_dir, IDENTITY, overwrite=False)
    torch.save(save_tiny(output_dir, tied=True, step=7), output_dir / f"expected-{os.environ['RANK']}.pt")
    os._exit(0)  # under load, one of torch's threads has crashed a normal exit
