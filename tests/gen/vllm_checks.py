"""Checks that tests/gen/test_vllm_engine.py runs in separate processes, since vLLM changes its process too much.

python vllm_checks.py single MODEL_FOLDER ...      one process, one engine per folder, one after the other
python vllm_checks.py bfloat16 MODEL_FOLDER        float32 logits of a bfloat16 model
python vllm_checks.py sleep MODEL_FOLDER           on a GPU, where vLLM can sleep
torchrun ... vllm_checks.py ranks TP MODEL_FOLDER  one engine per rank, TP ranks per copy of the model
"""

import os
import sys
from unittest.mock import patch

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from gen.engine import vllm_internals
from gen.engine.base import Engine, EngineConfig, Sampling, kv_cache_bytes, make_engine
from gen.engine.weight_sync import probe, sync_weights

STOP = frozenset(range(20, 28))
LONG = [(7 * i) % 150 + 4 for i in range(70)]  # longer than two blocks of the prefix cache
PROMPTS = [[5, 9, 17], LONG, [7], [100, 3, 99, 12]]
SEEDS = [11, 222, 3333, 44444]


def start(folder: str, **options) -> Engine:
    return make_engine("vllm", EngineConfig(folder, max_model_len=128, **options))


def sample(engine: Engine, prompts=PROMPTS, seeds=SEEDS, **options):
    options = {"n": 4, "temperature": 0.8, "max_tokens": 20, "stop_ids": STOP} | options
    finished = options.pop("finished", None)
    return engine.sample(prompts, Sampling(**options), seeds, finished)


def ids(groups) -> list:
    return [[completion.token_ids for completion in group] for group in groups]


def worst_difference(model, groups, prompts=PROMPTS, temperature=0.8) -> float:
    """The largest |engine - full forward| over all log-probs."""
    worst = 0.0
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
            logps = (logits / temperature).log_softmax(-1)[
                torch.arange(len(completion.token_ids)), completion.token_ids
            ]
            worst = max(worst, (logps - torch.tensor(completion.logps)).abs().max().item())
    return worst


def check_top_p(model, engine: Engine, top_p: float = 0.7) -> None:
    """Log-probs are renormalised over the kept tokens, and the same call gives the same result after other calls."""
    groups = sample(engine, top_p=top_p)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
            for row, token, logp in zip(logits / 0.8, completion.token_ids, completion.logps, strict=True):
                probs = row.softmax(-1)
                before = probs[probs > probs[token]].sum()
                assert before < top_p + 1e-4, "a token outside the kept set was sampled"
                ordered = probs.sort(descending=True).values
                kept = ordered[ordered.cumsum(0) - ordered < top_p].sum()
                assert abs((probs[token] / kept).log() - logp) < 1e-3
    assert sample(engine, top_p=top_p) == groups


def perturb(model, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))


def names(model) -> set:
    return {name for name, _ in model.named_parameters()}


def expect_value_error(fragment: str, call) -> None:
    try:
        call()
    except ValueError as error:
        assert fragment in str(error), error
    else:
        raise AssertionError(f"no ValueError about {fragment!r}")


def expect_refused_syncs(engine: Engine, model) -> None:
    """A tensor that is lost, or two that are swapped, on the way to the loader: the sync must refuse both."""
    load, (a, b) = engine.load_weights, (f"model.layers.{i}.input_layernorm.weight" for i in (0, 1))

    def lose_one(weights, version):
        return load([pair for pair in weights if pair[0] != a], version)

    def exchange_two(weights, version):
        pairs = dict(weights)
        pairs[a], pairs[b] = pairs[b], pairs[a]
        return load(pairs.items(), version)

    for fault, says in (
        (lose_one, "nothing was written to 1 of"),
        (exchange_two, "2 parameters of the engine are not what was sent"),
    ):
        engine.load_weights = fault  # type: ignore[method-assign]
        try:
            sync_weights(engine, model.named_parameters(), names(model), 3)
        except RuntimeError as error:
            assert says in str(error), error
        else:
            raise AssertionError(f"{fault.__name__} went unnoticed")
    engine.load_weights = load  # type: ignore[method-assign]


def expect_faults_inside_the_loader(engine: Engine, model) -> None:
    """vLLM's loader gets the right tensors, but leaves out one parameter, or swaps two layers. It swaps only parameters
    that cannot be read back on the CPU, where the probe must find the fault."""
    [worker] = engine.llm.collective_rpc(lambda worker: worker)  # type: ignore[attr-defined]
    vllm_model = worker.get_model()
    load = type(vllm_model).load_weights
    left_out, (a, b) = "model.layers.1.mlp.down_proj.weight", (f"model.layers.{i}." for i in (0, 1))

    def leave_out(pairs):
        return load(vllm_model, [pair for pair in pairs if pair[0] != left_out])

    def exchange(pairs):
        other = {a: b, b: a}
        pairs = [(name, name[: len(a)], tensor) for name, tensor in pairs]
        linear = ("mlp", "attn")
        return load(
            vllm_model,
            [
                (
                    name.replace(layer, other[layer])
                    if layer in other and any(part in name for part in linear)
                    else name,
                    t,
                )
                for name, layer, t in pairs
            ],
        )

    def policy_logps(prompt, completions):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + c for c in completions])).logits[:, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(2, torch.tensor(completions)[:, :, None]).flatten()

    tries = ((5, leave_out, left_out), (6, exchange, "does not sample from the policy"), (7, None, ""))
    for version, fault, says in tries:
        if fault is not None:
            vllm_model.load_weights = fault
        try:
            sync_weights(engine, model.named_parameters(), names(model), version)
            probe(engine, policy_logps, PROMPTS[0], Sampling(8, 8), seed=1, tolerance=0.01)
        except RuntimeError as error:
            assert says and says in str(error), error
        else:
            assert not says, f"{fault} went unnoticed"


def expect_another_vllm_refused() -> None:
    """The refusal is one sentence that names what is missing."""
    for gone in ("vllm.gone:it", "vllm.inputs:gone", "vllm:LLM.gone"):
        with patch.object(vllm_internals, "NEEDED", [gone]):
            expect_value_error(f"lacks {gone}: install another version", lambda: vllm_internals.check(()))
    expect_value_error("EngineArgs.gone", lambda: vllm_internals.check(["seed", "gone"]))
    vllm_internals.check(["seed"])


def check_single(folder: str) -> None:
    host = (torch.get_num_threads(), torch.set_num_threads, os.sched_getaffinity(0), os.environ.get("LD_PRELOAD"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = start(folder, dtype="float32", max_batch=64)
    after = (torch.get_num_threads(), torch.set_num_threads, os.sched_getaffinity(0), os.environ.get("LD_PRELOAD"))
    assert after == host, (host, after)
    assert engine.version == -1

    told: dict = {}
    first = sample(engine, finished=told.setdefault)
    assert told == dict(enumerate(first))
    assert worst_difference(model, first) < 1e-3
    completions = [completion for group in first for completion in group]
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        stopped = completion.finish_reason == "stop"
        assert not STOP & set(completion.token_ids[:-1]) and (completion.token_ids[-1] in STOP) == stopped
        assert stopped or len(completion.token_ids) == 20

    assert sample(engine) == first  # now from the prefix cache
    assert ids(sample(engine, seeds=[1, 2, 3, 4])) != ids(first)
    [[alone]] = sample(engine, [LONG], [SEEDS[1] + 2], n=1)
    assert alone.token_ids == first[1][2].token_ids  # sample i draws from seed + i, whatever its batch
    free = sample(engine, n=30, stop_ids=())
    assert all(len(c.token_ids) == 20 and c.finish_reason == "length" for group in free for c in group)
    assert any({2, 3} & set(c.token_ids[:-1]) for group in free for c in group), "the EOS of the folder stopped it"
    for prompt, [greedy] in zip(PROMPTS, sample(engine, n=1, greedy=True), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + greedy.token_ids])).logits[0, len(prompt) - 1 : -1]
        assert greedy.token_ids == logits.argmax(-1).tolist()
    many = [[(i * j) % 150 + 4 for j in range(100)] for i in range(60)]  # more prompt tokens than fit into one batch
    assert worst_difference(model, sample(engine, many, list(range(60)), n=1), many) < 1e-3
    cut = sample(engine, max_tokens=80, stop_ids=())  # the context of the long prompt ends first
    assert [{len(c.token_ids) for c in group} for group in cut] == [{80}, {128 - len(LONG)}, {80}, {80}]
    assert {c.finish_reason for c in cut[1]} == {"length"}
    expect_value_error("max_model_len", lambda: sample(engine, [[5] * 128], [1]))
    expect_value_error("n=1", lambda: sample(engine, greedy=True))
    assert sample(engine, [], []) == []

    check_top_p(model, engine)
    for version in (1, 2):
        perturb(model, version)
        assert worst_difference(model, sample(engine)) > 0.1  # the weights are stale
        sync_weights(engine, model.named_parameters(), names(model), version)
        assert engine.version == version
        assert worst_difference(model, sample(engine)) < 1e-3
        assert worst_difference(model, sample(engine, n=1, greedy=True), temperature=1.0) < 1e-3
    expect_refused_syncs(engine, model)
    engine.sleep()
    expect_asleep(engine)
    sync_weights(engine, model.named_parameters(), names(model), 4)
    assert worst_difference(model, sample(engine)) < 1e-3
    expect_faults_inside_the_loader(engine, model)
    expect_another_vllm_refused()
    engine.close()


def expect_asleep(engine: Engine) -> None:
    try:
        sample(engine)
    except RuntimeError as error:
        assert "load weights" in str(error) and engine.version == -1
    else:
        raise AssertionError("it sampled in its sleep")


def check_crowded(folder: str) -> None:
    """With steps scheduled ahead, as on a GPU, and few blocks, sequences are preempted. Neither this nor a failed call
    before may lose or repeat tokens."""
    from vllm.platforms.cpu import CpuPlatform

    settle = CpuPlatform.check_and_update_config

    def ahead(config) -> None:
        settle(config)
        config.scheduler_config.async_scheduling = True

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    few = patch("gen.engine.vllm.cpu_kv_bytes", lambda config, dtype, *_: kv_cache_bytes(config, dtype, 16 * 32))
    with few, patch.object(CpuPlatform, "check_and_update_config", staticmethod(ahead)):
        engine = start(folder, dtype="float32", max_batch=30)
    core, options = engine.llm.llm_engine.engine_core.engine_core, {"n": 8, "max_tokens": 58}  # type: ignore[attr-defined]
    with patch.object(core.scheduler, "_preempt_request", wraps=core.scheduler._preempt_request) as preempted:
        groups = sample(engine, **options)
    assert preempted.call_count > 0 and core.batch_queue is not None
    assert worst_difference(model, groups) < 1e-3
    assert {c.finish_reason for group in groups for c in group if len(c.token_ids) < 58} == {"stop"}
    try:
        sample(engine, finished=lambda *_: 1 / 0, **options)
    except ZeroDivisionError:
        assert core.batch_queue, "nothing was in flight"
    assert sample(engine, **options) == groups
    engine.close()


def check_bfloat16(folder: str) -> None:
    """The head's logits are float32, like the trainer's; otherwise the difference would be twice as large."""
    body = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    engine = start(folder, dtype="bfloat16", max_batch=64)

    def mean_difference(dtype: torch.dtype) -> float:
        head = body.lm_head.weight.detach().to(dtype)
        differences = []
        for prompt, group in zip(PROMPTS, sample(engine, temperature=1.0), strict=True):
            for completion in group:
                with torch.no_grad():
                    hidden = body.model(torch.tensor([prompt + completion.token_ids])).last_hidden_state[0]
                    logits = torch.nn.functional.linear(hidden[len(prompt) - 1 : -1].to(dtype), head).float()
                tokens = torch.arange(len(completion.token_ids)), completion.token_ids
                differences.append((logits.log_softmax(-1)[tokens] - torch.tensor(completion.logps)).abs())
        return torch.cat(differences).mean().item()

    rounded, exact = mean_difference(torch.bfloat16), mean_difference(torch.float32)
    print(f"mean difference to a bfloat16 head {rounded:.4f}, to a float32 head {exact:.4f}")
    assert exact < rounded and engine.llm.llm_engine.model_config.head_dtype == torch.float32
    engine.close()


def check_sleep(folder: str) -> None:
    """On a GPU: `sleep` frees weights and cache, and later samples use the weights that are loaded then."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = start(
        folder, dtype="float32", max_batch=64, enforce_eager=True, gpu_memory_utilization=0.2, sleep_mode=True
    )
    free, total = torch.cuda.mem_get_info()
    for version in (1, 2):
        sample(engine)
        engine.sleep()
        assert torch.cuda.mem_get_info()[0] - free > 0.1 * total and engine.version == -1
        expect_asleep(engine)
        perturb(model, version)
        sync_weights(engine, model.named_parameters(), names(model), version)
        assert worst_difference(model, sample(engine)) < 1e-2
    engine.close()


def check_ranks(tensor_parallel_size: int, folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = start(folder, dtype="float32", max_batch=64, tensor_parallel_size=tensor_parallel_size)
    mine = slice(0, 3) if rank == 0 else slice(3, 4)  # ranks may have different numbers of prompts
    perturb(model, 1)
    sync_weights(engine, model.named_parameters(), names(model), 1)
    groups = sample(engine, PROMPTS[mine], SEEDS[mine])
    assert worst_difference(model, groups, PROMPTS[mine]) < 1e-3
    for version in (2, 3):  # a change in only one rank's share of a tensor, for both kinds of shares
        with torch.no_grad():
            model.model.embed_tokens.weight[:8] *= 1.5
        sync_weights(engine, model.named_parameters(), names(model), version)
    groups = sample(engine, PROMPTS[mine], SEEDS[mine])
    assert worst_difference(model, groups, PROMPTS[mine]) < 1e-3
    everyone: list = [None, None]
    dist.all_gather_object(everyone, ids(groups))
    whole = everyone[0] + everyone[1]
    assert ids(sample(engine)) == whole  # the same completions on whichever rank a prompt is sampled
    engine.close()
    total = torch.ones(1)
    dist.all_reduce(total)  # the trainer's process group still works after the engine has closed
    assert total.item() == dist.get_world_size()
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "single":
        for path in sys.argv[2:]:
            check_single(path)
        check_crowded(sys.argv[2])
    elif sys.argv[1] in ("bfloat16", "sleep"):
        {"bfloat16": check_bfloat16, "sleep": check_sleep}[sys.argv[1]](sys.argv[2])
    else:
        check_ranks(int(sys.argv[2]), sys.argv[3])
    print("all checks passed")
