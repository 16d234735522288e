"""kernels.attention against the block-diagonal mask, and inside real transformers models against sequences alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from kernels import attention, reference
from kernels.attention import packed_attention, packed_layout, register

LENGTHS = [5, 1, 17, 3, 9, 16, 2]
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


def rows(heads=6, kv_heads=2, lengths=LENGTHS, dim=8, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, n, sum(lengths), dim) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def value_and_gradients(out, inputs):
    up = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return out.detach(), *torch.autograd.grad(out, inputs, up)


@pytest.mark.parametrize("window", [None, 1, 4, 16, 100])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_equals_the_block_diagonal_reference(window, kv_heads):
    inputs = rows(kv_heads=kv_heads)
    out, weights = packed_attention(None, *inputs, packed=packed_layout(LENGTHS), scaling=0.3, sliding_window=window)
    assert weights is None and out.shape == (1, sum(LENGTHS), 6, 8)
    expected = reference.packed_attention(*inputs, LENGTHS, scaling=0.3, sliding_window=window)
    pairs = zip(value_and_gradients(out, inputs), value_and_gradients(expected, inputs), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_varlen_call_means_the_same(monkeypatch, window, grouped):
    """What the CUDA path asks of varlen_attn: flash attention's documented contract, here in plain torch. torch 2.11
    has no grouped queries, later ones have a flag."""

    def grouped_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        assert enable_gqa
        key, value = key.repeat_interleave(3, 1), value.repeat_interleave(3, 1)
        return attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    def attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert query.shape == key.shape == value.shape and cu_seq_q.dtype == torch.int32 and max_q == max_k == 17
        left, right = window_size  # token i sees i - left .. i + right, both inclusive, -1 without bound
        out = []
        for start, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
            q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
            ahead = torch.arange(end - start)[None, :] - torch.arange(end - start)[:, None]
            seen = (ahead <= right) & ((ahead >= -left) | (left < 0))
            out.append(((q @ k.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
        return torch.cat(out)

    monkeypatch.setattr(attention, "varlen_attn", grouped_attn if grouped else attn)
    monkeypatch.setattr(attention, "GROUPED", {"enable_gqa": True} if grouped else {})
    inputs = rows()
    out = attention._varlen(*(x[0].transpose(0, 1) for x in inputs), packed_layout(LENGTHS), 0.3, window)
    expected = reference.packed_attention(*inputs, LENGTHS, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(out[None], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize(
    "dim, dtype", [(32, torch.bfloat16), (20, torch.bfloat16), (288, torch.bfloat16), (32, torch.float32)]
)
def test_on_a_gpu(window, dim, dtype):
    """Flash attention, and what it does not take: other head sizes, float32."""
    inputs = rows(dim=dim, dtype=dtype, device="cuda")
    assert attention.flash_takes(dtype, dim) == (dim == 32 and dtype == torch.bfloat16)
    options = {"scaling": 0.3 * (32 / dim) ** 0.5, "sliding_window": window}
    out, _ = packed_attention(None, *inputs, packed=packed_layout(LENGTHS, "cuda"), **options)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference.packed_attention(*exact, LENGTHS, **options)
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
    """Against transformers' own eager attention, one sequence at a time: logits, and every parameter's gradient."""
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
    """Other tokens in document 2: every other document's logits are bitwise the same, and so are its gradients."""
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
    lengths = torch.randint(1, 500, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    layout = packed_layout(lengths)
    batches, unbatch = layout.batches
    padded = torch.cat([batch.flatten() for batch in batches])
    assert torch.equal(padded[unbatch], torch.arange(sum(lengths)))
    assert len(padded) <= sum(lengths) / attention.SHORTEST_IN_BATCH
    assert layout.cu_seqlens.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert layout.max_seqlen == max(lengths)


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


@pytest.mark.parametrize("compiled", [False, True])
def test_values_of_another_size_than_keys(compiled):
    """As in DeepSeek-V3's latent attention."""
    (query, key, _), (_, _, value) = rows(), rows(dim=12)
    attend = torch.compile(packed_attention, backend="aot_eager") if compiled else packed_attention
    out, _ = attend(None, query, key, value, packed=packed_layout(LENGTHS), scaling=0.3)
    assert out.shape == (1, sum(LENGTHS), 6, 12)
    expected = reference.packed_attention(query, key, value, LENGTHS, scaling=0.3)
    inputs = [query, key, value]
    for got, want in zip(value_and_gradients(out, inputs), value_and_gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [[], [3, 0, 2]])
def test_layout_refuses_empty_sequences(lengths):
    with pytest.raises(ValueError):
        packed_layout(lengths)
