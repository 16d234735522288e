"""kernels.attention compared with a block-diagonal mask, and, in real transformers models, with separate sequences."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from kernels import attention, reference
from kernels.attention import packed_attention, packed_layout, register

LENGTHS = [5, 1, 17, 3, 9, 16, 2]
# Lengths, and the shared tokens of each: groups of several, of one, with a prompt of one token, of equal and different
# lengths, and one whose first sequence is shorter than others.
LAYOUTS = {
    "plain": (LENGTHS, None),
    "shared": ([9, 12, 5, 30, 17, 20, 18, 1, 3, 2, 12], [0, 4, 4, 4, 0, 16, 16, 0, 0, 1, 1]),
    "shared by none": (LENGTHS, [0] * len(LENGTHS)),
}
SMALL = dict(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2-sliding": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=4, layer_types=["full_attention", "sliding_attention"]
    ),
}


def rows(heads=6, kv_heads=2, layout="plain", dim=8, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    lengths, shared = LAYOUTS[layout]
    shapes = [(1, n, sum(lengths) - sum(shared or []), dim) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def value_and_gradients(out, inputs):
    up = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return out.detach(), *torch.autograd.grad(out, inputs, up)


@pytest.mark.parametrize("window", [None, 1, 4, 16, 100])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_block_diagonal_reference(layout, window, kv_heads):
    lengths, shared = LAYOUTS[layout]
    inputs, packed = rows(kv_heads=kv_heads, layout=layout), packed_layout(lengths, shared=shared)
    out, weights = packed_attention(None, *inputs, packed=packed, scaling=0.3, sliding_window=window)
    assert weights is None and out.shape == (1, len(packed.position_ids), 6, 8)
    expected = reference.packed_attention(*inputs, lengths, shared, scaling=0.3, sliding_window=window)
    pairs = zip(value_and_gradients(out, inputs), value_and_gradients(expected, inputs), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 4, 16, 100])
def test_sharing_is_the_attention_of_whole_sequences(window):
    """The reference implementation with shared beginnings equals the one without, which sees whole sequences."""
    lengths, shared = LAYOUTS["shared"]
    inputs, packed = rows(layout="shared", dtype=torch.float64), packed_layout(lengths, shared=shared)
    whole = [x[:, :, packed.places] for x in inputs]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    own = [t for end, length, skip in zip(ends, lengths, shared, strict=True) for t in range(end - length + skip, end)]
    expected = reference.packed_attention(*whole, lengths, scaling=0.3, sliding_window=window)[:, own]
    out = reference.packed_attention(*inputs, lengths, shared, scaling=0.3, sliding_window=window)
    for got, want in zip(value_and_gradients(out, inputs), value_and_gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    positions = torch.cat([torch.arange(length) for length in lengths])
    assert torch.equal(packed.position_ids[packed.places], positions)


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """Flash attention's documented contract in plain torch: windows are relative to the bottom-right diagonal."""
    assert key.shape[1:] == query.shape[1:] == value.shape[1:] and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert int(cu_seq_k.diff().max()) == max_k and int(cu_seq_q.diff().max()) <= max_q
    assert cu_seq_q[-1] == len(query) and cu_seq_k[-1] == len(key) == len(value)
    left, right = window_size  # query i sees keys i - left .. i + right, both inclusive; -1: no bound
    out = []
    for start, end, first, last in zip(cu_seq_q, cu_seq_q[1:], cu_seq_k, cu_seq_k[1:], strict=False):
        q, k, v = (x.transpose(0, 1) for x in (query[start:end], key[first:last], value[first:last]))
        at = torch.arange(end - start) + (last - first) - (end - start)
        ahead = torch.arange(last - first)[None, :] - at[:, None]
        seen = (ahead <= right) & ((ahead >= -left) | (left < 0))
        out.append(((q @ k.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_varlen_call_means_the_same(monkeypatch, window, grouped, layout):
    """The CUDA path's call of varlen_attn. torch 2.11 has no grouped queries; later versions have a flag."""

    def grouped_attn(query, key, value, *arguments, enable_gqa=False, **options):
        assert enable_gqa
        return varlen_attn(query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), *arguments, **options)

    monkeypatch.setattr(attention, "varlen_attn", grouped_attn if grouped else varlen_attn)
    monkeypatch.setattr(attention, "GROUPED", {"enable_gqa": True} if grouped else {})
    lengths, shared = LAYOUTS[layout]
    inputs = rows(layout=layout)
    packed = packed_layout(lengths, shared=shared)
    out = attention._varlen(*(x[0].transpose(0, 1) for x in inputs), packed, 0.3, window)
    expected = reference.packed_attention(*inputs, lengths, shared, scaling=0.3, sliding_window=window)
    for got, want in zip(value_and_gradients(out[None], inputs), value_and_gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize(
    "dim, dtype", [(32, torch.bfloat16), (20, torch.bfloat16), (288, torch.bfloat16), (32, torch.float32)]
)
def test_on_a_gpu(window, dim, dtype, layout):
    """Flash attention, whose windows must be relative to the bottom right, and the cases that it does not support:
    other head sizes, float32."""
    lengths, shared = LAYOUTS[layout]
    inputs = rows(dim=dim, dtype=dtype, device="cuda", layout=layout)
    assert attention.flash_takes(dtype, dim) == (dim == 32 and dtype == torch.bfloat16)
    options = {"scaling": 0.3 * (32 / dim) ** 0.5, "sliding_window": window}
    out, _ = packed_attention(None, *inputs, packed=packed_layout(lengths, "cuda", shared), **options)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference.packed_attention(*exact, lengths, shared, **options)
    for got, want in zip(value_and_gradients(out, inputs), value_and_gradients(expected, exact), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-2)


def build(name: str, implementation: str):
    register()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=implementation)


def logits(model, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:  # [T] -> [T, V]
    layout = packed_layout(lengths)
    out = model(input_ids=ids[None], position_ids=layout.position_ids[None], use_cache=False, packed=layout)
    return out.logits[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_packed_equals_its_sequences_alone(name, checkpointing):
    """Logits and all gradients equal those of transformers' eager attention on one sequence at a time."""
    packed, alone = build(name, "packed"), build(name, "eager")
    alone.load_state_dict(packed.state_dict())
    if checkpointing:
        packed.gradient_checkpointing_enable({"use_reentrant": False})
        packed.train()
    ids = torch.randint(0, 61, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    got = logits(packed, ids, LENGTHS)
    want = torch.cat([alone(input_ids=part[None], use_cache=False).logits[0] for part in ids.split(LENGTHS)])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    up = torch.linspace(-1, 1, got.numel()).view_as(got)
    got.backward(up)
    want.backward(up)
    for (key, ours), theirs in zip(packed.named_parameters(), alone.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm() + 1e-8, key


@pytest.mark.parametrize("name", CONFIGS)
def test_one_document_never_sees_another(name):
    """If document 2 has other tokens, the logits and gradients of all other documents stay bitwise the same."""
    model = build(name, "packed")
    ids = torch.randint(0, 61, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    start, end = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    other[start:end] = (other[start:end] + 7) % 61
    elsewhere = torch.ones(len(ids), dtype=torch.bool)
    elsewhere[start:end] = False

    results = []
    for tokens in (ids, other):
        model.zero_grad()
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
        layout = packed_layout(LENGTHS)
        out = model(
            inputs_embeds=embedded[None], position_ids=layout.position_ids[None], use_cache=False, packed=layout
        ).logits[0]
        out[elsewhere].square().sum().backward()
        results.append((out.detach(), embedded.grad))
    (before, grad_before), (after, grad_after) = results
    assert torch.equal(before[elsewhere], after[elsewhere])
    assert torch.equal(grad_before[elsewhere], grad_after[elsewhere])
    assert not grad_before[start:end].any() and not grad_after[start:end].any()
    assert not torch.equal(before[start:end], after[start:end])


def test_layout_pads_little_and_places_every_token_once():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 500, (200,), generator=generator).tolist()
    layout = packed_layout(lengths)
    assert layout.cu_seqlens.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert torch.equal(layout.cu_queries, layout.cu_seqlens) and not layout.shares
    assert layout.max_seqlen == max(lengths)
    own = torch.randint(1, 100, (200,), generator=generator).tolist()
    shared = [0 if i % 8 == 0 else 300 for i in range(200)]
    sharing = packed_layout([n + 300 for n in own], shared=shared)
    for packed, tokens in ((layout, sum(lengths)), (sharing, sum(own) + 25 * 300)):
        batches, unbatch = packed.batches
        padded = torch.cat([queries.flatten() for queries, _ in batches])
        assert torch.equal(padded[unbatch], torch.arange(tokens)) and len(packed.position_ids) == tokens
        assert len(padded) <= tokens / attention.SHORTEST_IN_BATCH
    assert sum(keys.numel() for _, keys in batches) <= len(sharing.places) / attention.SHORTEST_IN_BATCH


@pytest.mark.parametrize(
    "change",
    [
        {"packed": None},
        {"dropout": 0.1},
        {"packed": packed_layout([3, 4])},
        {"softcap": 30.0},
        {"attention_mask": torch.ones(1, 1)},
        {"s_aux": torch.zeros(6)},
        {"position_bias": torch.zeros(1)},
        {"is_causal": False},
        {"output_attentions": True},
        {"anything": 0.0},
    ],
)
def test_refuses(change):
    arguments = {"packed": packed_layout(LENGTHS), "attention_mask": None, "scaling": 0.3, **change}
    with pytest.raises(ValueError):
        packed_attention(None, *rows(), **arguments)


def test_refuses_what_is_not_the_rows_own_causal_attention():
    query, key, value = rows()
    encoder = torch.nn.Module()
    encoder.is_causal = False
    with pytest.raises(ValueError, match="causal"):
        packed_attention(encoder, query, key, value, packed=packed_layout(LENGTHS))
    with pytest.raises(ValueError, match="key"):
        packed_attention(None, query, key[:, :, 1:], value[:, :, 1:], packed=packed_layout(LENGTHS))
    harmless = {"position_ids": torch.arange(3), "use_cache": False, "output_attentions": False, "is_causal": True}
    packed_attention(None, query, key, value, packed=packed_layout(LENGTHS), cache=None, **harmless)


@pytest.mark.parametrize("layout", ["plain", "shared"])
@pytest.mark.parametrize("compiled", [False, True])
def test_values_of_another_size_than_keys(compiled, layout):
    """DeepSeek-V3's latent attention has such values."""
    lengths, shared = LAYOUTS[layout]
    (query, key, _), (_, _, value) = rows(layout=layout), rows(dim=12, layout=layout)
    attend = torch.compile(packed_attention, backend="aot_eager") if compiled else packed_attention
    options = {"scaling": 0.3, "sliding_window": 6}
    out, _ = attend(None, query, key, value, packed=packed_layout(lengths, shared=shared), **options)
    assert out.shape == (1, query.shape[2], 6, 12)
    expected = reference.packed_attention(query, key, value, lengths, shared, **options)
    inputs = [query, key, value]
    for got, want in zip(value_and_gradients(out, inputs), value_and_gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [[], [3, 0, 2]])
def test_layout_refuses_empty_sequences(lengths):
    with pytest.raises(ValueError):
        packed_layout(lengths)
