"""Compiled blocks have the gradients, names and checkpoints of eager ones, and few graphs for all lengths."""

import shutil

import numpy as np
import pytest
import torch
from torch.func import vjp
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from kernels import attention
from kernels.attention import packed_layout
from sft_core.model.adapters import check_adapters
from sft_core.model.parallel import Sharding, check_compile
from sft_core.run.config import ModelConfig, SFTConfig
from tests.grpo_core.test_train import TRAIN as GRPO
from tests.grpo_core.test_train import options, weights
from tests.kernels.test_attention import varlen_attn
from tests.launch import metrics, run
from tests.processes import run_ranks
from tests.sft_core.test_train import train

# Varied numbers of sequences, lengths and maximum lengths; of the third and the last, one of two ranks gets nothing.
LENGTHS = [[60, 31, 90], [5, 7], [128], [7, 7, 2, 50], [11] * 9, [3]]
ON = {"torch_compile": "true", "torch_compile_backend": "aot_eager"}


def passes(model: str, options: dict, flags: dict, graphs: int, bf16: bool = False) -> dict:
    """On each rank, eager and compiled: gradients of training passes, log-probs of other passes, and all names.

    After one pass of each kind no further graph may be compiled, and there are `graphs` in total. Blocks with and
    without a checkpoint have separate graphs; recomputing from offloaded inputs, which are no longer views, has
    another.
    """
    from torch._dynamo.utils import counters

    from sft_core.data.packing import idle_sequences, pack_sequences
    from sft_core.model.adapters import dropout, without_adapters
    from sft_core.model.parallel import make_mesh, shard
    from sft_core.model.policy import load_policy
    from sft_core.run import distributed

    rank, world_size, _, device = distributed.init_distributed(60)

    def batch(lengths, shares):
        rows = [[9] + [(7 * i + n) % 300 + 5 for i in range(1, n)] for n in lengths[rank::world_size]]
        shared = [shares * (i > 0) for i in range(len(rows))]  # the first token
        scored = [[True] * len(row) for row in rows]
        return pack_sequences(rows, scored, device, shared) if rows else idle_sequences(device)

    found = {}
    for backend in (None, flags.get("compile_backend", "aot_eager")):
        policy = load_policy(ModelConfig(model, **options))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.2, generator=generator)  # before it is moved to the device
        policy = shard(policy, make_mesh(device), Sharding(bf16, **flags | {"compile_backend": backend}))
        values: dict = {"names": list(policy.state_dict())}
        for i, lengths in enumerate(LENGTHS):
            sequences = batch(lengths, shares=i % 2)
            torch.manual_seed(i)
            with dropout(policy):
                logps, *_ = policy(sequences)
                ((-1.0 if rank < len(lengths) else 0.0) * logps.sum()).backward()
            for name, parameter in policy.named_parameters():
                if parameter.grad is not None:
                    values[f"{i} {name}"] = parameter.grad.full_tensor().cpu().numpy().copy()
                    parameter.grad = None
            with torch.no_grad():
                values[f"{i} scored"] = policy(sequences)[0].cpu().numpy().copy()
                if options.get("use_peft"):
                    values[f"{i} reference"] = without_adapters(policy)(sequences)[0].cpu().numpy().copy()
            torch._dynamo.config.error_on_recompile = backend is not None
        found["compiled" if backend else "eager"] = values
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"], counters
    distributed.shutdown()
    return found


def check(found: dict, tolerance: float = 1e-5) -> None:
    eager, compiled = found["eager"], found["compiled"]
    assert eager.pop("names") == compiled.pop("names") and eager.keys() == compiled.keys()
    for key, expected in eager.items():
        assert np.linalg.norm(compiled[key] - expected) <= tolerance * np.linalg.norm(expected) + 1e-8, key


LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.2}
OFFLOADED = {"gradient_checkpointing": True, "checkpointing_every": 2, "activation_offloading": True}
CASES = [  # ranks, options of the model, flags, graphs
    pytest.param(2, {}, {"gradient_checkpointing": True, "cpu_offload": True}, 2, id="on the host, two ranks"),
    pytest.param(1, LORA, {"gradient_checkpointing": True}, 4, id="adapters"),
    pytest.param(1, LORA | {"load_in_4bit": True}, {}, 4, id="quantised"),
    pytest.param(1, {}, OFFLOADED, 5, id="every second, offloaded"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "model_options", "flags", "graphs"), CASES)
def test_compiling_changes_no_gradient_and_makes_few_graphs(tiny_model, ranks, model_options, flags, graphs):
    for found in run_ranks(ranks, passes, tiny_model, model_options, flags, graphs):
        check(found)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("flags", "graphs"), [({}, 2), ({"gradient_checkpointing": True, "checkpointing_every": 2}, 4)]
)
def test_inductor_on_a_cpu(tiny_model, flags, graphs):
    [found] = run_ranks(1, passes, tiny_model, {}, flags | {"compile_backend": "inductor"}, graphs)
    check(found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", [{}, {"gradient_checkpointing": True}])
def test_inductor_and_varlen_on_a_gpu(tiny_model, flags):
    """This is in bfloat16, where fused kernels round less often than eager ones."""
    [found] = run_ranks(1, passes, tiny_model, {}, flags | {"compile_backend": "inductor"}, 2, True)
    check(found, tolerance=5e-2)


def test_the_path_of_a_gpu_is_one_graph_a_kind_of_block(monkeypatch):
    """torch's varlen attention with a substitute kernel for the CPU, traced and differentiated by torch's own rules."""
    from torch._dynamo.utils import counters
    from torch.nn.attention import varlen
    from transformers import AttentionInterface

    from sft_core.model.parallel import _compile

    def kernel(cu_q, cu_k, max_k, window_size, scale):
        def attend(query, key, value):
            key, value = attention._repeat(query, key, value)
            return varlen_attn(query, key, value, cu_q, cu_k, max_k, max_k, scale=scale, window_size=window_size)

        return attend

    def forward(query, key, value, cu_q, cu_k, max_q, max_k, is_causal, scale, window_size, *rest):
        assert max_q == max_k == int(cu_k.diff().max()) and is_causal == (window_size == [-1, 0])
        out = kernel(cu_q, cu_k, max_k, window_size, scale)(query, key, value)
        return out, out.new_zeros(out.shape[1], out.shape[0]), torch.zeros(2, dtype=torch.uint64)

    def backward(gradient, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, is_causal, rng, scale, window_size):
        attend = kernel(cu_q, cu_k, max_k, window_size, scale)
        return tuple(x.contiguous() for x in vjp(attend, query, key, value)[1](gradient))

    def attention_of_a_gpu(module, query, key, value, mask, *, packed, scaling, sliding_window=None, **kwargs):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return attention._varlen(q, k, v, packed, scaling, sliding_window)[None], None

    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)
    AttentionInterface.register("varlen on a CPU", attention_of_a_gpu)
    attention.register()
    layers = 10  # more than the graphs per function that torch allows by default
    info = Qwen2Config(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["full_attention", "sliding_attention"] * (layers // 2),
    )
    models = {}
    for name in ("packed", "varlen on a CPU"):
        torch.manual_seed(0)
        models[name] = AutoModelForCausalLM.from_config(info, attn_implementation=name)
    eager, compiled = models.values()
    for block in compiled.model.layers:
        _compile(block, "aot_eager")
    counters.clear()
    sharing = [([60, 31, 90], [0, 20, 20]), ([9, 8], [0, 7]), ([12, 40, 9, 10, 11], [0, 1, 0, 9, 9])]
    layouts = [(LENGTHS[0], None), *sharing, *((lengths, None) for lengths in LENGTHS[1:])]
    for i, (lengths, shared) in enumerate(layouts):
        layout = packed_layout(lengths, shared=shared)
        ids = torch.arange(len(layout.position_ids))[None] % 61
        for model in (eager, compiled):
            model.zero_grad()
            passed = dict(input_ids=ids, position_ids=layout.position_ids[None], packed=layout, use_cache=False)
            model(**passed).logits[..., 0].sum().backward()
        for (name, got), want in zip(compiled.named_parameters(), eager.parameters(), strict=True):
            assert (got.grad - want.grad).norm() <= 1e-5 * want.grad.norm() + 1e-8, (i, name)
        monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", i > 0)  # the first two are of different kinds
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]


@pytest.mark.slow
def test_a_run_goes_on_with_the_flag_changed(tiny_model, rows, tmp_path):
    """Two compiled steps, then two eager ones from the checkpoint, equal those of a run that is always eager."""
    evaluated = dict(do_eval="true", dataset_test_split=rows)
    whole = train(tiny_model, rows, tmp_path / "whole", max_steps=4, **evaluated)
    saving = dict(save_strategy="steps", save_steps=2)
    train(tiny_model, rows, tmp_path / "two", max_steps=2, **saving, **evaluated, **ON)
    found = train(tiny_model, rows, tmp_path / "two", max_steps=4, **saving, **evaluated)
    assert found.keys() == whole.keys()
    assert all((found[key] - whole[key]).norm() < 1e-3 * whole[key].norm() for key in whole)
    losses = {out: [row["loss"] for row in metrics(tmp_path / out) if "loss" in row] for out in ("whole", "two")}
    assert losses["two"] == pytest.approx(losses["whole"], rel=1e-4)


@pytest.mark.slow
def test_grpo_compiles_policy_and_reference(tiny_model, problems, tmp_path):
    """On the same rollouts, eager and compiled, engine and policy agree, and the weights are the same."""
    more = dict(max_steps=2, beta=0.1, num_iterations=2, prompts_per_step=2)
    recorded = dict(save_rollouts=tmp_path / "rollouts")
    code, output = run(
        GRPO, options(tiny_model, problems, tmp_path / "one", **more, **recorded, **ON), tmp_path / "log"
    )
    assert code == 0, output
    replayed = dict(rollouts_from=tmp_path / "rollouts")
    code, output = run(GRPO, options(tiny_model, problems, tmp_path / "two", **more, **replayed), tmp_path / "log2")
    assert code == 0, output
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all((one[name] - two[name]).norm() < 1e-4 * two[name].norm() for name in two)


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    config = SFTConfig("out", torch_compile=True)
    for option in ("use_dora", "load_in_8bit"):
        with pytest.raises(ValueError, match=f"{option} cannot be combined with torch_compile"):
            check_adapters(ModelConfig("m", use_peft=True, **{option: True}), config, LlamaConfig())
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_compile(SFTConfig("out"), torch.device("cpu"))
    with pytest.raises(ValueError, match="there is no no-such-compiler: install it"):
        check_compile(config, torch.device("cpu"))
    with pytest.raises(ValueError, match="give --torch_compile true too"):
        SFTConfig("out", torch_compile_backend="aot_eager")
