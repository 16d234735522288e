"""vLLM inside the trainer's process: one engine per rank, whose weights are replaced in place.

Under torchrun every rank creates its own engine with vLLM's "external_launcher", which runs the worker in the calling
process and uses the trainer's process group. With `tensor_parallel_size` T, T neighbouring ranks share one copy of the
model. They gather the prompts of all T ranks, sample all of them in lockstep, and each rank keeps the completions of
its own prompts. Callers see no difference, except that the T ranks must call together.

Not supported, on purpose: vLLM in separate processes or on separate machines (use vLLM's own weight transfer for that),
LoRA, quantisation, multi-modal models.

    engine = VLLMEngine(EngineConfig("path/to/model", max_model_len=512, dtype="float32"))
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig

from gen.engine import vllm_internals
from gen.engine.base import (
    ASLEEP,
    INITIAL_VERSION,
    Completion,
    EngineConfig,
    Loaded,
    Sampling,
    Synced,
    check_request,
    kv_cache_bytes,
)

GIB = 1 << 30
CPU_KV_LIMIT = GIB  # vLLM queues sequences beyond it; the variable VLLM_CPU_KVCACHE_SPACE (whole GiB) overrides it


@contextmanager
def _host_settings_kept() -> Iterator[None]:
    """Undo the changes that a starting engine makes to the process.

    vLLM sets torch to one thread, replaces `torch.set_num_threads` with a no-op on the CPU, may bind the process to
    cores, and sets environment variables that child processes would inherit.
    """
    set_num_threads, threads, cores = torch.set_num_threads, torch.get_num_threads(), os.sched_getaffinity(0)
    inherited = {name: os.environ.get(name) for name in ("LD_PRELOAD", "LOCAL_WORLD_SIZE")}
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
        for name, value in inherited.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _default_group_kept() -> Iterator[None]:
    """Keep the default process group, which vLLM destroys at shutdown: the trainer created it and still needs it."""
    destroy = dist.destroy_process_group
    dist.destroy_process_group = lambda group=None: None if group is None else destroy(group)
    try:
        yield
    finally:
        dist.destroy_process_group = destroy


def cpu_kv_bytes(config: Any, dtype: torch.dtype, max_model_len: int, max_batch: int) -> int:
    """Bytes of KV cache on the CPU: `max_batch` full-length sequences, but at most 1 GiB unless one needs more."""
    sequence = kv_cache_bytes(config, dtype, (max_model_len // 128 + 2) * 128)  # whole blocks
    return max(sequence, min(max_batch * sequence, CPU_KV_LIMIT))


def _check_gpu_memory(share: float) -> None:
    gc.collect()
    torch.cuda.empty_cache()  # memory that torch caches would count as used
    free, total = torch.cuda.mem_get_info()
    if share * total > free:
        raise ValueError(
            f"the engine needs {share * total / GIB:.1f} GiB (gpu_memory_utilization {share:g} of "
            f"{total / GIB:.1f} GiB) but only {free / GIB:.1f} GiB of the GPU are free: lower gpu_memory_utilization "
            f"(in training vllm_gpu_memory_utilization) below {free / total:.2f}, or free memory on the device"
        )


class VLLMEngine:
    """`Engine` on vLLM; see the module docstring.

    If the trainer uses torch.distributed, it must initialise its process group first: vLLM joins an existing group and
    otherwise creates its own.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.on_cpu = not torch.cuda.is_available()
        self.tensor_parallel_size = config.tensor_parallel_size
        self.max_model_len = config.max_model_len
        self.version = INITIAL_VERSION
        self.synced: Synced | None = None
        self.asleep = False
        self.request_numbers = count()
        self.joined_group = dist.is_initialized()
        ranks = dist.get_world_size() if self.joined_group else 1
        if ranks % config.tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size {config.tensor_parallel_size} does not divide the number of ranks ({ranks}): "
                "change one of them, since that many torchrun ranks share each copy of the model"
            )
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are replaced in this process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR" if self.on_cpu else "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # else vLLM sends usage statistics
        options: dict[str, Any] = {
            "dtype": config.torch_dtype,
            "seed": config.seed,
            "max_model_len": config.max_model_len,
            "max_num_seqs": config.max_batch,
            "tensor_parallel_size": config.tensor_parallel_size,
            "enforce_eager": config.enforce_eager or self.on_cpu,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # the folder's generation_config.json would change the sampling
            "logprobs_mode": "processed_logprobs",  # after the temperature, as the trainer computes them
            "enable_prefix_caching": True,
            "enable_sleep_mode": config.sleep_mode and not self.on_cpu,
            "disable_log_stats": True,
        }
        if self.joined_group:
            options["distributed_executor_backend"] = "external_launcher"
            rank = str(dist.get_rank())
            for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", str(ranks))):
                os.environ.setdefault(name, value)
        if self.on_cpu:
            # With chunked prefill vLLM rewinds the seeded generator, which a CPU generator cannot do, so prompts are
            # never split. Blocks of 32 tokens (default on the CPU: 128) let shorter prompts be shared, too.
            options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(config.max_model_len, 4096)}
            options["block_size"] = 32
            if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
                info = AutoConfig.from_pretrained(config.model_path)
                options["kv_cache_memory_bytes"] = cpu_kv_bytes(
                    info, config.torch_dtype, config.max_model_len, config.max_batch
                )
        else:
            _check_gpu_memory(config.gpu_memory_utilization)
            options["gpu_memory_utilization"] = config.gpu_memory_utilization
            # vLLM captures CUDA graphs for multiples of 16 up to 512; larger batches run without a graph.
            options["max_cudagraph_capture_size"] = options["max_num_seqs"] = -(-config.max_batch // 16) * 16
        if config.torch_dtype != torch.float32:  # float32 logits, as in the trainer
            options["hf_overrides"] = {"head_dtype": "float32"}
        with _host_settings_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of vLLM's own imports
            import vllm

            self.vllm = vllm
            vllm_internals.check(options)
            self.llm = vllm.LLM(config.model_path, **options)

    def sample(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seeds: list[int],
        finished: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """See `gen.engine.base.Engine.sample`. With tensor parallelism all ranks of a group call together."""
        if self.asleep:
            raise RuntimeError(ASLEEP)
        check_request(prompts, seeds, self.max_model_len)
        # Else the rounding would depend on the prefixes that earlier calls left in the cache.
        self.llm.reset_prefix_cache()
        everyone, own = self._gather(prompts, seeds)
        params = self.vllm.SamplingParams(
            temperature=0.0 if sampling.greedy else sampling.temperature,
            top_p=1.0 if sampling.greedy else sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=0,  # replaced for each request
            logprobs=0,  # only for the sampled token
            detokenize=False,
            ignore_eos=True,  # only `stop_ids` end a completion, not the model's own EOS
            stop_token_ids=sorted(sampling.stop_ids),
        )

        def ended(prompt: int, group: list[Completion]) -> None:
            if finished is not None and own.start <= prompt < own.stop:
                finished(prompt - own.start, group)

        # vLLM compiles a sampler helper at first use. On a CPU this takes seconds and a C++ compiler and saves little.
        with torch.compiler.set_stance("force_eager") if self.on_cpu else nullcontext():
            return vllm_internals.run_requests(self.llm, everyone, sampling.n, params, self.request_numbers, ended)[own]

    def _gather(self, prompts: list[list[int]], seeds: list[int]) -> tuple[list[tuple[list[int], int]], slice]:
        """The (prompt, seed) pairs of all ranks that share this copy of the model, and this rank's slice of them."""
        mine = list(zip(prompts, seeds, strict=True))
        if self.tensor_parallel_size == 1:
            return mine, slice(0, len(mine))
        group = vllm_internals.tensor_parallel_group()
        parts: list[Any] = [None] * group.world_size
        dist.all_gather_object(parts, mine, group=group.cpu_group)
        first = sum(len(part) for part in parts[: group.rank_in_group])
        return [pair for part in parts for pair in part], slice(first, first + len(mine))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Loaded:
        """See `gen.engine.base.Engine.load_weights`. With tensor parallelism every rank passes the full tensors."""
        self.version = INITIAL_VERSION
        if self.asleep:
            self._wake("weights")  # this allocates memory only; its contents are undefined until the load below
        written, held = vllm_internals.replace_weights(self.llm, weights)
        if self.asleep:
            self._wake("kv_cache")
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache because requests were running: sync weights after sampling")
        loaded = Loaded(written, held, share=vllm_internals.tensor_parallel_group().rank_in_group)
        self.version = version
        return loaded

    def sleep(self) -> None:
        """See `gen.engine.base.Engine.sleep`. On the CPU no memory is freed, since vLLM cannot sleep there."""
        self.version = INITIAL_VERSION
        if not self.on_cpu and not self.asleep:
            self.llm.sleep(level=2)  # level 1 would keep a copy of the old weights on the host
        self.asleep = True

    def _wake(self, part: str) -> None:
        if not self.on_cpu:
            torch.cuda.empty_cache()  # vLLM's allocator cannot use memory that torch caches
            self.llm.wake_up([part])

    def close(self) -> None:
        """Shut the engine down and free its memory. Call it before the trainer destroys its process group."""
        with _default_group_kept() if self.joined_group else nullcontext():
            self.llm.llm_engine.engine_core.shutdown()
            del self.llm
        gc.collect()
        if not self.on_cpu:
            torch.cuda.empty_cache()
