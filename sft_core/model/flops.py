"""The cost of a token in a Llama-like decoder: FLOPs, and bytes kept for the backward pass.

The counted block is that of transformers' Llama, Qwen2, Qwen3 and Mistral: two RMS norms, grouped causal attention and
a gated MLP. Mixtures of experts are not supported (their MLP counts once). Sliding windows count as full attention.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from kernels.linear_logprob import CHUNKS_IN_BLOCK, chunk_rows

# Dense bf16 FLOP/s from NVIDIA's data sheets, by a word of torch.cuda.get_device_name. The first match wins.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


class Shape(NamedTuple):
    """A decoder's sizes; `query` and `kv` are widths over all heads."""

    layers: int
    hidden: int
    ffn: int
    query: int
    kv: int
    vocab: int
    tied: bool
    qk_norm: bool


def shape(info: PretrainedConfig) -> Shape:
    c = info.get_text_config()
    heads = c.num_attention_heads
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
    kv_heads = getattr(c, "num_key_value_heads", None) or heads
    ffn = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
    return Shape(
        c.num_hidden_layers,
        c.hidden_size,
        ffn,
        heads * head_dim,
        kv_heads * head_dim,
        c.vocab_size,
        bool(c.tie_word_embeddings),
        c.model_type.startswith("qwen3"),
    )


def linear_sizes(s: Shape) -> dict[str, tuple[int, int]]:
    """The linear layers of a block: name -> (inputs, outputs)."""
    return {
        "q_proj": (s.hidden, s.query),
        "k_proj": (s.hidden, s.kv),
        "v_proj": (s.hidden, s.kv),
        "o_proj": (s.query, s.hidden),
        "gate_proj": (s.hidden, s.ffn),
        "up_proj": (s.hidden, s.ffn),
        "down_proj": (s.ffn, s.hidden),
    }


def block_weights(s: Shape) -> int:
    """Weights of the linear layers of all blocks."""
    return s.layers * sum(a * b for a, b in linear_sizes(s).values())


def training_flops(info: PretrainedConfig, lengths: Sequence[int], shared: Sequence[int] = ()) -> float:
    """FLOPs of forward and backward over documents of `lengths` tokens: 6 N + 6 L (heads x head size) S per token.

    N is the number of weights of the blocks' linear layers and of the head, which counts once, tied or not. Norms,
    biases and the embedding's lookup do not count. S is the length of the token's document. Every token counts as
    scored, recomputation does not count, and frozen weights count as trained ones: the usual numerator of MFU.
    `shared`: for each document that shares tokens with an earlier one, their number; the earlier document counts them.
    """
    s = shape(info)
    squares = sum(n * n for n in lengths) - sum(n * n for n in shared)
    attention = 2.0 * s.layers * s.query * squares  # forward: half of the squares QK' and PV each
    return 6 * (block_weights(s) + s.vocab * s.hidden) * (sum(lengths) - sum(shared)) + 3 * attention


def attention_share(info: PretrainedConfig) -> float:
    """The factor for which the FLOPs of a document of S tokens are proportional to S + factor * S^2."""
    s = shape(info)
    return s.layers * s.query / (block_weights(s) + s.vocab * s.hidden)


def peak_flops(device: torch.device | str) -> float | None:
    """The card's dense bf16 peak [FLOP/s] by its data sheet; None if it is not known, for example on a CPU."""
    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in PEAK_FLOPS.items() if re.search(rf"\b{card}\b", name)), None)


def saved_per_token(s: Shape, itemsize: int = 2, compiled: bool = False) -> int:
    """Bytes per token that one block saves for its backward pass, with varlen attention on a GPU.

    Saved are, for each norm, its input in float32 and its output before and after the weight (the latter is the linear
    layers' input); for attention, query, key, value (repeated to all query heads) and output; for the MLP, gate, silu,
    up and product. Compiled blocks keep a norm's input in its own dtype and its output, and recompute the silu.
    """
    norm = 2 * itemsize if compiled else 4 + 2 * itemsize
    qk_norm = (4 + itemsize) * (s.query + s.kv) if s.qk_norm and not compiled else 0  # Qwen3 norms queries and keys
    return 2 * norm * s.hidden + 4 * itemsize * s.query + qk_norm + (3 if compiled else 4) * itemsize * s.ffn


def tail_per_token(s: Shape, itemsize: int = 2) -> int:
    """Bytes per token between the last block and the logits during the head's backward pass.

    These are the final norm (as in a block), the scored rows' hidden states, and the gradients of these and all rows.
    """
    return (4 + 5 * itemsize) * s.hidden


def head_workspace(s: Shape, tokens: int, itemsize: int, device: str = "cuda", trained: bool = True) -> int:
    """Bytes of `kernels.linear_loss`, without the gradient of the hidden states. First these are the float32 logits of
    a chunk, the gradients of a block's logits in the compute dtype, and the weight's float32 gradient; then this
    gradient and its copy in the compute dtype."""
    chunk = chunk_rows(s.vocab, device)
    kept = chunk * CHUNKS_IN_BLOCK[device]
    logits = (4 * min(tokens, chunk) + itemsize * min(tokens, kept)) * s.vocab
    weight = s.vocab * s.hidden * trained
    return 4 * weight + max(logits, itemsize * weight if itemsize < 4 else 0)
