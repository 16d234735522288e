"""The one face that everything needing text from a model talks to: prompt token ids in, completions out.

Tokens in, tokens out: an engine knows no tokenizer, no text and no chat template, so sampled ids are never decoded
and encoded again. Two makers stand behind the same protocol:

* `vllm`  (gen/engine/vllm.py)   real vLLM inside this process, one a rank, for training at speed;
* `torch` (gen/engine/torch.py)  the model in plain torch with a KV cache, for tests, exactness and machines
  without vLLM.

Left out on purpose: top-k, min-p and penalties, streaming, engines behind HTTP. top-p is for evaluation alone: with it
the sampler's distribution is not the one that a trainer scores.

    engine = make_engine("vllm", EngineConfig("path/to/model", max_model_len=512, dtype="float32"))
    [[completion, ...]] = engine.sample([[1, 2, 3]], Sampling(n=8, max_tokens=64, stop_ids={2}), seeds=[7])
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from sft_core.model.policy import load_whole

Checksum = tuple[
    str, int
]  # of a tensor: dtype and shape, and a sum over its bytes (`gen.engine.weight_sync.Checksums`)
ENGINES = ("vllm", "torch")
ASLEEP = "the engine sleeps: load weights before sampling from it"
INITIAL_VERSION = -1  # the weights that an engine was started with, or that a failed load left behind: never trained on


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt.

    `finish_reason` is "stop" when the last id is a stop id (sampled, and included in `token_ids`) and "length" when
    `max_tokens` cut the text off.
    """

    token_ids: list[int]  # [L]
    logps: list[float]  # [L], log-prob of each id under softmax(logits / temperature)
    finish_reason: str


@dataclass(frozen=True)
class Sampling:
    """How every prompt of a call is continued.

    A completion ends with one of `stop_ids`, after `max_tokens`, or where the context does, `max_model_len` tokens of
    prompt and completion; the model folder's own EOS and generation_config.json count for nothing here.

    Raises ValueError, naming the number to change, for what no engine can do.
    """

    n: int  # completions of each prompt
    max_tokens: int
    temperature: float = 1.0
    stop_ids: Collection[int] = ()
    greedy: bool = False  # the most likely token; its log-probs are those at temperature 1, whatever `temperature` says
    top_p: float = 1.0  # below 1: of the fewest most likely tokens that reach it; log-probs are those among them

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_tokens < 1:
            raise ValueError(f"n and max_tokens must be at least 1, got n={self.n}, max_tokens={self.max_tokens}")
        if self.greedy and self.n != 1:
            raise ValueError(f"greedy sampling gives the same completion every time: set n=1, got n={self.n}")
        if not self.greedy and not self.temperature > 0:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}: use greedy=True for the most likely tokens"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}: 1 leaves nothing out")


@dataclass(frozen=True)
class Loaded:
    """What a `load_weights` did, for `gen.engine.weight_sync.sync_weights` to check.

    Raises RuntimeError where the loader left a parameter of the engine as it was, which would stay old for ever.
    """

    written: Collection[str]  # the engine's own parameters that the loader wrote
    held: Mapping[str, Checksum | None]  # of each of the engine's own parameters, after; None: it cannot be read back
    as_sent: bool = False  # each of them is held under the name and in the form in which it is sent
    share: int = 0  # which part of the model this rank's engine holds (its tensor-parallel rank)

    def __post_init__(self) -> None:
        if unwritten := sorted(set(self.held).difference(self.written)):
            raise RuntimeError(
                f"weight sync: nothing was written to {len(unwritten)} of the engine's parameters, the first is "
                f"{unwritten[0]!r}: the policy has no such weight, or it was lost on the way"
            )


Synced = tuple[dict[str, Checksum], Loaded]  # of the tensors that were sent, and what became of them


class Engine(Protocol):
    """What the trainer, the evaluation and the data generation need from a sampler."""

    version: int  # policy version of the loaded weights
    synced: Synced | None  # the last `gen.engine.weight_sync.sync_weights` that went well

    def sample(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seeds: list[int],
        finished: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample `sampling.n` completions of every prompt; sample i of prompt p draws from seed `seeds[p] + i`.

        `finished(p, completions)` is called as soon as prompt p has all its completions, while others are sampled.

        Raises ValueError for a request that cannot be served (see `check_request`).
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Loaded:
        """Replace the weights in place by (Hugging Face name, full tensor) pairs and forget cached prefixes.

        Returns what was written, and what the engine then holds. `version` is set last, when all went well; while
        loading and after a failure it is -1. Callers want `gen.engine.weight_sync.sync_weights`, which checks.
        """
        ...

    def sleep(self) -> None:
        """Give the memory of weights and cache back until the next `load_weights`; the version is -1 until then, and
        `sample` raises RuntimeError."""
        ...

    def close(self) -> None:
        """Give the memory back. Call it before the default process group is destroyed."""
        ...


def check_engine_available(name: str) -> None:
    """Raise ValueError, with the remedy, if the engine is unknown or its package is absent; imports nothing heavy."""
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}: use one of {', '.join(ENGINES)}")
    missing = [package for package in ("vllm", "accelerate") if importlib.util.find_spec(package) is None]
    if name == "vllm" and missing:
        extra = "vllm" if torch.cuda.is_available() else "cpu"
        raise ValueError(
            f"--engine vllm was asked for but {' and '.join(missing)} is not installed: run pip install -e "
            f"'.[{extra}]', or use --engine torch, which needs nothing more but is slower"
        )


def check_request(prompts: list[list[int]], seeds: list[int], max_model_len: int) -> None:
    """Raise ValueError for what no engine can serve, naming the number to change."""
    if len(seeds) != len(prompts):
        raise ValueError(f"one seed per prompt is needed: got {len(seeds)} seeds for {len(prompts)} prompts")
    longest = max((len(ids) for ids in prompts), default=1)
    if min((len(ids) for ids in prompts), default=1) < 1:
        raise ValueError("a prompt without tokens cannot be continued: start it with the beginning-of-text token")
    if longest >= max_model_len:
        raise ValueError(
            f"the longest prompt ({longest} tokens) leaves no room in the engine's max_model_len ({max_model_len}): "
            "raise max_model_len, or leave out such prompts"
        )


def kv_cache_bytes(config: Any, dtype: torch.dtype, tokens: int) -> int:
    """Keys and values of `tokens` tokens in all layers of the model that a transformers `config` describes."""
    config = config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim * dtype.itemsize * tokens


@dataclass(frozen=True)
class EngineConfig:
    """What an engine is started with."""

    model_path: str  # a local Hugging Face folder, or a Hub id
    max_model_len: int  # tokens of prompt plus completion
    dtype: str | torch.dtype = "bfloat16"  # or auto: bfloat16 on a GPU, else float32
    seed: int = 0
    max_batch: int = 256  # sequences sampled at once; more are queued
    tensor_parallel_size: int = 1  # vLLM: neighbouring ranks that share one copy of the model
    gpu_memory_utilization: float = 0.3  # vLLM on a GPU: its part of the memory (weights, KV cache, work space)
    enforce_eager: bool = False  # vLLM on a GPU: no graph capture and no compilation (always so on the CPU)
    sleep_mode: bool = False  # vLLM on a GPU: `sleep` will be called (vLLM on the CPU cannot)

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype == "auto":
            return torch.bfloat16 if torch.cuda.is_available() else torch.float32
        return getattr(torch, self.dtype) if isinstance(self.dtype, str) else self.dtype


def make_engine(name: str, config: EngineConfig) -> Engine:
    """Start the engine `name`."""
    check_engine_available(name)
    if name == "vllm":
        from gen.engine.vllm import VLLMEngine

        info = AutoConfig.from_pretrained(config.model_path)
        if type(info) in MODEL_FOR_CAUSAL_LM_MAPPING and getattr(info, "quantization_config", None) is None:
            # The names alone are read: vLLM starts with half of a fused weight, too.
            load_whole(config.model_path, device_map="meta")
        return VLLMEngine(config)
    from gen.engine.torch import TorchEngine

    if config.tensor_parallel_size != 1:
        raise ValueError(
            f"--engine torch cannot split a model: set tensor_parallel_size=1 (got {config.tensor_parallel_size})"
        )
    return TorchEngine(
        config.model_path, dtype=config.torch_dtype, max_model_len=config.max_model_len, max_batch=config.max_batch
    )
