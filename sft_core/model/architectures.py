"""Checks from its configuration whether a model's architecture can be trained here, before any weight is loaded.

Packing is correct only if tokens see each other through attention alone, and only if that attention is the one that
`kernels.attention` computes. With a short convolution, a state space, ALiBi or a window passed as a mask, a token would
silently see the neighbouring sequences. A list of model names would soon be out of date. Instead, a small copy of the
model with random weights computes the log-probs of a few sequences twice: packed by the policy, and each sequence alone
by the model's own forward pass with its own attention (`eager`). The copy keeps every layer and option of the
configuration. Widths, heads, vocabulary and experts become few. Windows, chunks and caps become so small that short
sequences reach them. No parameter stays at zero or one, where it might have no effect.

Not checked, on purpose: behaviour that changes only at lengths too large to run here. Rotary types whose factors change
with the length are refused by their configuration (`sft_core.model.policy.check_positions`).
"""

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from sft_core.data.packing import pack_sequences
from sft_core.model.policy import Policy, count_parameters
from sft_core.run.config import ModelConfig
from sft_core.run.distributed import on_first_rank
from sft_core.run.options import require

LENGTHS = (7, 1, 24, 13, 20)  # 24 and 20 share a batch of `kernels.attention`
SEQUENCES = [[2 + (7 * i * i + 3 * length) % 61 for i in range(length)] for length in LENGTHS]
BEGUN = [SEQUENCES[2] + sequence for sequence in SEQUENCES]  # all share the same beginning
SHARED = [0] + [LENGTHS[2]] * (len(BEGUN) - 1)
CPU = torch.device("cpu")
LARGEST_COPY = 200_000_000  # parameters
# Root mean square of the log-probs' differences, in standard deviations of the log-probs. float32 rounding gives 1e-5;
# in the small copy a wrong architecture gives 0.03 and more.
TOLERANCE = 1e-4

# Patterns for the names of numbers in a configuration. The hidden size is often heads x head size, so these three are
# divided together.
HEADS = r"heads$|n_head$|query_groups$"
HEAD_SIZE = r"head_?(dim|size)$|_head$|dim_head$|kv_channels$|rotary_dim$"
WIDTH = r"hidden_size|d_model|n_embd|embedding_size|embed_dim|proj_dim|lru_width|d_ssm|d_inner"
AT_MOST = {  # the first matching pattern is used
    r"vocab": 64,
    r"layer": 1 << 60,
    r"intermediate|ffn|feed_forward_size|d_ff$|dim_ff$|dff$|n_inner": 32,
    r"rank$|state(_size)?$": 16,
    r"experts$": 8,
    r"window|chunk|block_size": 5,  # less than most sequences have
    r"groups?$": 1,
    r"per_tok|top_?k|moe_k$": 2,
    r"soft_?cap": 1.0,
    r"_token_(id|index)$": 0,
}


def check_architecture(info: PretrainedConfig, config: ModelConfig) -> None:
    """Check the architecture with a small copy of the model. A collective.

    Raises:
        ValueError: packed sequences have other log-probs than each sequence alone, or no small copy of the model can be
            made, or the weights are quantised already.
    """
    require(
        getattr(info, "quantization_config", None) is None,
        f"{config.model_name_or_path} is quantised already, and such weights can be neither trained nor saved: give "
        "the model it was made from, with --use_peft true --load_in_4bit true if memory is short.",
    )
    on_first_rank(lambda: _check_copy(info, config))


@torch.no_grad()
def shares_beginnings(info: PretrainedConfig, config: ModelConfig) -> bool:
    """Whether sharing a beginning leaves the log-probs of sequences unchanged, in a small copy. A collective."""

    def compare() -> bool:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            policy = Policy(_build(shrunken(info), config, "packed"))
        scored = [[True] * len(sequence) for sequence in BEGUN]
        expected, logps = (policy(pack_sequences(BEGUN, scored, CPU, shared))[0] for shared in (None, SHARED))
        return bool((logps - expected).square().mean().sqrt() < TOLERANCE * expected.std())

    return on_first_rank(compare)


@torch.no_grad()
def _check_copy(info: PretrainedConfig, config: ModelConfig) -> None:
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small = shrunken(info)
            size = count_parameters(small, config.trust_remote_code)
            require(size <= LARGEST_COPY, f"a small copy of it still has {size} parameters")
            alone, packed = (_build(small, config, attention) for attention in ("eager", "packed"))
            packed.load_state_dict(alone.state_dict())
            policy, expected = Policy(packed), logps_alone(alone)
            logps = policy(pack_sequences(SEQUENCES, [[True] * n for n in LENGTHS], CPU))[0]
            gap = float((logps - expected).square().mean().sqrt() / expected.std())
            require(gap < TOLERANCE, f"packing changes the log-probs of tokens by {gap:.2g} standard deviations")
    except Exception as error:  # the model's code, with sizes that may not fit together, raises anything
        reason = " ".join(str(error).split()) if isinstance(error, ValueError) else repr(error)
        raise ValueError(
            f"{config.model_name_or_path} cannot be trained here: its architecture, {info.model_type}, is not known to "
            f"work with packed sequences ({reason}). Choose a model of another architecture."
        ) from error


def _build(info: PretrainedConfig, config: ModelConfig, attention: str) -> Any:
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(info),
        attn_implementation=attention,
        dtype=torch.float32,
        trust_remote_code=config.trust_remote_code,
    ).eval()
    for parameter in model.parameters():  # none may stay at 0 or 1, where it might have no effect
        parameter.add_(torch.randn_like(parameter) * (parameter.shape or [9])[-1] ** -0.5)
    return model


def logps_alone(model: Any) -> Tensor:  # [N]
    """Log-probs of all but the first token of each of SEQUENCES, with one forward pass per sequence."""
    logps = []
    for sequence in SEQUENCES:
        ids = torch.tensor([sequence])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        logps.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(logps)


# --- the small copy ----------------------------------------------------------------------------------------------


def shrunken(info: PretrainedConfig) -> PretrainedConfig:
    """The same configuration with small numbers."""
    small = copy.deepcopy(info)
    entries = list(_entries(vars(small)))

    def divisor(pattern: str, multiple: int, least: int, default: int = 1) -> int:
        """The largest power of two by which the matching numbers can be divided, so that each stays a multiple of
        `multiple` and at least `least`."""
        found = [value for _, name, value in entries if re.search(pattern, name) and type(value) is int]
        numbers = [value for value in found if value >= least] or [default]
        power = 1
        while all(n % (2 * power * multiple) == 0 and n // power >= 2 * least for n in numbers):
            power *= 2
        return power

    text = small.get_text_config()
    widths = divisor(WIDTH, 4, 8)
    heads = min(divisor(HEADS, 1, 2), widths)
    size = divisor(HEAD_SIZE, 8, 8, default=text.hidden_size // getattr(text, "num_attention_heads", 1))
    size = min(size, widths // heads)
    factors = {HEADS: heads, HEAD_SIZE: size, WIDTH: heads * size}

    def smaller(name: str, value: Any) -> Any:
        if isinstance(value, list):  # longrope has one factor per frequency
            return value[: len(value) // size] if name.endswith("_factor") else [smaller(name, v) for v in value]
        if type(value) not in (int, float) or value <= 0:
            return value
        if "position" in name:  # the sequences must fit and stay below the length at which rotary factors change
            return max(value, 64)
        for pattern, largest in AT_MOST.items():
            if re.search(pattern, name):
                return min(value, largest)
        factor = next((factor for pattern, factor in factors.items() if re.search(pattern, name)), None)
        return value if factor is None else max(1, value // factor)

    for fields, name, value in entries:
        fields[name] = smaller(name, value)
    return small


def _entries(fields: dict) -> Iterator[tuple[dict, str, Any]]:
    """Every entry of a configuration and of nested configurations, with the dict that holds it."""
    for name, value in fields.items():
        if isinstance(value, dict | PretrainedConfig):
            yield from _entries(value if isinstance(value, dict) else vars(value))
        elif isinstance(name, str):
            yield fields, name, value
