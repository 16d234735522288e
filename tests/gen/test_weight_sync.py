"""Every fault of a weight sync must stop the run: the tests inject faults between the trainer and the engine."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gen.engine.base import Loaded, Sampling
from gen.engine.torch import TorchEngine
from gen.engine.weight_sync import checksums, not_as_sent, probe, sync_weights, unchanged
from tests import faults
from tests.processes import run_ranks

PROMPT = [5, 9, 17, 30]
SWAPPED = ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")


@pytest.fixture
def engine(tied_llama):
    return TorchEngine(tied_llama, max_model_len=64)


@pytest.fixture
def policy(tied_llama):
    """A model with the engine's shape and other weights, like after a step."""
    model = TorchEngine(tied_llama, max_model_len=64).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    return model


def names(policy):
    return {name for name, _ in policy.named_parameters()}


def scorer(policy, temperature=1.0, shift=0):
    """policy_logps for `probe`; shift=1 is the classic off-by-one between logits and targets."""

    def logps(prompt, completions):
        ids = torch.tensor([prompt + completion for completion in completions])
        rows = torch.arange(len(completions[0])) + len(prompt) - 1 + shift
        with torch.no_grad():
            logits = policy(ids).logits[:, rows]
        return (logits / temperature).log_softmax(-1).gather(2, ids[:, len(prompt) :, None]).flatten()

    return logps


def probed(engine, logps, temperature=1.0):
    return probe(engine, logps, PROMPT, Sampling(8, 16, temperature), seed=1, tolerance=1e-3)


def test_a_healthy_sync_passes_and_the_probe_agrees(engine, policy):
    assert engine.version == -1
    sync_weights(engine, policy.named_parameters(), names(policy), 3)
    assert engine.version == 3
    figures = probed(engine, scorer(policy))
    assert figures["mean_abs"] <= figures["max_abs"] < 1e-5 and figures["tokens"] == 8 * 16
    assert probed(engine, scorer(policy, temperature=0.6), temperature=0.6)["max_abs"] < 1e-5


def test_a_skipped_sync_fails_twice(engine, policy, monkeypatch):
    with pytest.raises(RuntimeError, match="weights version -1"):
        probed(engine, scorer(policy))
    monkeypatch.setattr(engine, "load_weights", lambda weights, version: Loaded(dict(weights), {}))
    with pytest.raises(RuntimeError, match="version is still -1"):
        sync_weights(engine, policy.named_parameters(), names(policy), 1)


def faulty(engine, monkeypatch, fault):
    """Let `fault` change the list of (name, tensor) on its way into the engine."""
    load = engine.load_weights
    monkeypatch.setattr(engine, "load_weights", lambda weights, version: load(fault(list(weights)), version))


def test_swapped_tensors(engine, policy, monkeypatch):
    def swap(weights):
        tensors = dict(weights)
        tensors[SWAPPED[0]], tensors[SWAPPED[1]] = tensors[SWAPPED[1]], tensors[SWAPPED[0]]
        return tensors.items()

    faulty(engine, monkeypatch, swap)
    with pytest.raises(RuntimeError, match="2 parameters of the engine are not what was sent.*gate_proj"):
        sync_weights(engine, policy.named_parameters(), names(policy), 1)


def test_one_changed_element(engine, policy, monkeypatch):
    def change(weights):
        name, tensor = weights[4]
        tensor = tensor.detach().clone()
        tensor.view(-1)[17] += 1e-6
        return [*weights[:4], (name, tensor), *weights[5:]]

    faulty(engine, monkeypatch, change)
    with pytest.raises(RuntimeError, match="1 parameters of the engine are not"):
        sync_weights(engine, policy.named_parameters(), names(policy), 1)


def test_a_dropped_tensor_on_the_way_in(engine, policy, monkeypatch):
    faulty(engine, monkeypatch, lambda weights: weights[:-1])
    with pytest.raises(RuntimeError, match="model.norm.weight"):
        sync_weights(engine, policy.named_parameters(), names(policy), 1)
    assert engine.version == -1


class Forgetful:
    """An engine that, like vLLM's loader, ignores missing tensors."""

    version, synced = 0, None

    def load_weights(self, weights, version):
        self.version = version
        return Loaded(dict(weights), {})


def test_names_missing_unknown_and_repeated(policy):
    pairs = list(policy.named_parameters())
    with pytest.raises(RuntimeError, match="1 tensors did not arrive: model.norm.weight"):
        sync_weights(Forgetful(), pairs[:-1], names(policy), 1)
    with pytest.raises(RuntimeError, match="'spare' is not in the policy"):
        sync_weights(Forgetful(), [*pairs, ("spare", torch.zeros(1))], names(policy), 1)
    with pytest.raises(RuntimeError, match="sent twice"):
        sync_weights(Forgetful(), [*pairs, pairs[0]], names(policy), 1)
    sync_weights(Forgetful(), pairs, names(policy), 1)


def test_the_engine_refuses_wrong_shapes(engine, policy):
    weights = dict(policy.named_parameters())
    weights["model.norm.weight"] = torch.ones(1)  # copy_ would broadcast it
    with pytest.raises(RuntimeError, match="shape"):
        sync_weights(engine, weights.items(), names(policy), 1)


def test_a_failed_load_leaves_no_trusted_version(engine, policy):
    sync_weights(engine, policy.named_parameters(), names(policy), 5)
    with pytest.raises(RuntimeError):
        engine.load_weights(list(policy.named_parameters())[:-1], 6)
    assert engine.version == -1


def changed(policy):
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    return policy


def leave_one(engine):
    """One parameter keeps its old value, although the loader reports that it wrote it."""
    name = "model.layers.0.mlp.up_proj.weight"
    load, old = engine.load_weights, engine.model.get_parameter(name).clone()

    def load_weights(weights, version):
        loaded = load(weights, version)
        engine.model.get_parameter(name).copy_(old)
        return Loaded(loaded.written, checksums(dict(engine.model.named_parameters())), as_sent=True)

    engine.load_weights = load_weights


def exchange_layers(engine):
    """The loader gets the right tensors but swaps those of two layers."""
    load = faults.TorchEngine.load_weights
    engine.load_weights = lambda weights, version: faults.with_layers_exchanged(load, engine, weights, version)


@pytest.mark.parametrize(("fault", "names_it"), [(leave_one, "1 .*up_proj"), (exchange_layers, "14 .*layers.0")])
def test_what_the_engine_holds_is_read_back(engine, policy, fault, names_it):
    """Both faults pass the checks of the loader. (The norms of the two layers are equal.)"""
    sync_weights(engine, policy.named_parameters(), names(policy), 1)
    fault(engine)
    with pytest.raises(RuntimeError, match=names_it.replace(" ", " parameters of the engine are not what was sent")):
        sync_weights(engine, changed(policy).named_parameters(), names(policy), 2)


def test_a_parameter_that_nothing_writes(engine, policy):
    """The engine's head is not tied to the embedding, unlike the policy's."""
    faults.untie(engine)
    with pytest.raises(RuntimeError, match="nothing was written to 1 of the engine's parameters.*'lm_head.weight'"):
        sync_weights(engine, policy.named_parameters(), names(policy), 1)
    assert engine.version == -1


def test_buffers_and_parameters_of_another_dtype(tied_llama):
    """Persistent buffers are sent, too. A parameter that the engine keeps in float32 is not reported as different."""
    engine = TorchEngine(tied_llama, dtype=torch.bfloat16, max_model_len=64)
    engine.model.model.norm.float()
    engine.model.model.register_buffer("bias", torch.zeros(3))
    weights = {name: p.detach().bfloat16() for name, p in engine.model.named_parameters()} | {
        "model.bias": torch.ones(3)
    }
    for version in (1, 2):
        sync_weights(engine, weights.items(), set(weights), version)
        assert engine.model.model.bias.tolist() == [version] * 3
        weights = {name: 2 * tensor for name, tensor in weights.items()}


def synced(sent, held):
    """A `Synced` with numbers in place of checksums; None: the parameter cannot be read back."""
    return {name: ("", value) for name, value in sent.items()}, Loaded(
        held, {name: None if value is None else ("", value) for name, value in held.items()}
    )


PARTS = {f"l.attn.{part}.weight": i for i, part in enumerate(["q_proj", "k_proj", "v_proj", "o_proj"])}
NEW = {name: value + 10 for name, value in PARTS.items()}


@pytest.mark.parametrize(
    ("sent", "held", "stale"),
    [
        (NEW, {"l.attn.qkv_proj.weight": 51, "l.attn.o_proj.weight": 13}, set()),
        (NEW, {"l.attn.qkv_proj.weight": 50, "l.attn.o_proj.weight": 13}, {"l.attn.qkv_proj.weight"}),
        (NEW, {"l.attn.qkv_proj.weight": 51, "l.attn.o_proj.weight": 3}, {"l.attn.o_proj.weight"}),
        (NEW, {"l.attn.qkv_proj.weight": 51, "l.attn.o_proj.weight": 14}, {"l.attn.o_proj.weight"}),
        (NEW, {"l.attn.qkv_proj.weight": None, "l.attn.o_proj.weight": 13}, set()),  # repacked: never reported
        (PARTS, {"l.attn.qkv_proj.weight": 50, "l.attn.o_proj.weight": 3}, set()),  # nothing had to change
        (NEW | {"l.attn.v_proj.weight": 2}, {"l.attn.qkv_proj.weight": 50, "l.attn.o_proj.weight": 13}, set()),
    ],
)
def test_parameters_follow_what_they_are_made_of(sent, held, stale):
    before = synced(PARTS, {"l.attn.qkv_proj.weight": 50, "l.attn.o_proj.weight": 3})
    now = synced(sent, held)
    assert not_as_sent(before, now) | unchanged(before, now) == stale


def test_a_parameter_held_in_another_form_must_change():
    """For example, it is transposed, so that its checksum never equals that of the sent tensor."""
    before = synced({"h.c_attn.weight": 1}, {"h.c_attn.weight": 7})
    new = {"h.c_attn.weight": 2}
    for held, found in ((7, {"h.c_attn.weight"}), (8, set())):
        now = synced(new, {"h.c_attn.weight": held})
        assert not_as_sent(before, now) == set() and unchanged(before, now) == found


def _sync_on_a_rank(model, differs):
    from sft_core.run.distributed import init_distributed

    rank, *_ = init_distributed()
    engine = TorchEngine(model, max_model_len=64)
    weights = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    if differs and rank == 1:
        weights["model.norm.weight"] += 1
    try:
        sync_weights(engine, weights.items(), set(weights), 1)
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("differs", [False, True])
def test_engines_of_all_ranks_hold_the_same(tied_llama, differs):
    said = run_ranks(2, _sync_on_a_rank, tied_llama, differs)
    assert all(("1 parameters differ between the engines" in str(text)) == differs for text in said), said


def test_the_probe_sees_two_layers_that_changed_places(engine, policy):
    """If no parameter can be read back and the loader reports success, only the probe can find the fault."""
    sync_weights(engine, policy.named_parameters(), names(policy), 1)
    layers = engine.model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    for i, layer in enumerate(layers):
        layer.self_attn.layer_idx = i
    with pytest.raises(RuntimeError, match="does not sample from the policy"):
        probed(engine, scorer(policy))


@pytest.mark.slow
@pytest.mark.parametrize("layer", [5, 13, 25])
def test_the_probe_sees_swapped_layers_of_a_real_model(smollm2, layer):
    """It swaps the three pairs of layers that differ least, with a run's default prompt and limit."""
    policy = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    engine = TorchEngine(str(smollm2), max_model_len=128)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    question = [{"role": "user", "content": "Ben has 17 pens, buys 5 more and gives 3 away. How many are left?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    probed = partial(probe, engine, scorer(policy), prompt, Sampling(8, 16), seed=3, tolerance=0.1)
    assert probed()["mean_abs"] < 1e-4
    layers = engine.model.model.layers
    layers[layer], layers[layer + 1] = layers[layer + 1], layers[layer]
    for i, one in enumerate(layers):
        one.self_attn.layer_idx = i
    with pytest.raises(RuntimeError, match="does not sample from the policy"):
        probed()


@pytest.mark.parametrize("fault", [{"temperature": 0.9}, {"shift": -1}], ids=["temperature", "off by one"])
def test_the_probe_finds_what_checksums_cannot(engine, policy, fault):
    sync_weights(engine, policy.named_parameters(), names(policy), 1)
    with pytest.raises(RuntimeError, match="does not sample from the policy"):
        probed(engine, scorer(policy, **fault))


def test_the_probe_fails_on_nan_and_on_wrong_lengths(engine, policy):
    with pytest.raises(RuntimeError, match="the policy's log-probs .* are not finite"):
        probed(engine, lambda prompt, completions: torch.full((8 * 16,), torch.nan))
    with pytest.raises(RuntimeError, match="scored"):
        probed(engine, lambda prompt, completions: torch.zeros(8 * 16 - 1))
    sync_weights(engine, policy.named_parameters(), names(policy), 1)
    with torch.no_grad():
        engine.model.model.norm.weight[0] = torch.nan
    with pytest.raises(RuntimeError, match="the engine's log-probs .* are not finite"):
        probed(engine, lambda prompt, completions: torch.zeros(8 * 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("size", [0, 1, 7, 1000, (1 << 20) + 3])
def test_checksum_against_plain_integers(dtype, size):
    tensor = torch.randint(0, 200, (size,), generator=torch.Generator().manual_seed(0)).to(dtype)
    data = tensor.view(torch.uint8).numpy().tobytes()
    data += b"\0" * (-len(data) % 8)
    words = [int.from_bytes(data[i : i + 8], "little", signed=True) for i in range(0, len(data), 8)]
    total = sum((2 * i + 1) * word for i, word in enumerate(words))
    assert (checksums({"": tensor})[""][1] - total) % (1 << 64) == 0


def test_checksum_sees_order_dtype_shape_and_place():
    def checksum(tensor):
        return checksums({"": tensor})[""]

    a = torch.arange(24, dtype=torch.float32)
    swapped = a.clone()
    swapped[[3, 11]] = swapped[[11, 3]]
    variants = [a, swapped, a.view(4, 6), a.view(6, 4), a.view(torch.int32), a.flip(0), a.bfloat16()]
    assert len({checksum(v) for v in variants}) == len(variants)
    assert checksum(a[1:9]) == checksum(a[1:9].clone())  # a view whose storage starts between two words
    assert checksum(a.view(4, 6).T) == checksum(a.view(4, 6).T.contiguous())
    assert checksum(torch.zeros(8)) != checksum(torch.zeros(9))
