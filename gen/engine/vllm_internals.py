"""All uses of vLLM internals, that is, of anything but `LLM` and `SamplingParams`.

vLLM may change its internals in any version. `check` looks for them before an engine starts, so that an incompatible
vLLM is refused with one sentence, not with a traceback in the middle of a run. The code was checked against the sources
of vLLM 0.26, 0.32 and 0.33, and run with 0.26 and 0.32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from copy import copy
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn

from gen.engine.base import Checksum, Completion
from gen.engine.weight_sync import checksums

NEEDED = """
    vllm.inputs:tokens_input
    vllm.distributed.parallel_state:get_tp_group
    vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead
    vllm.v1.core.sched.scheduler:Scheduler.has_requests
    vllm.v1.engine.core:EngineCore.step_with_batch_queue
    vllm.v1.engine.core_client:InprocClient.add_request
    vllm.v1.engine.core_client:InprocClient.get_output
    vllm.v1.engine.core_client:InprocClient.abort_requests
    vllm.v1.engine.core_client:InprocClient.shutdown
    vllm.v1.engine.input_processor:InputProcessor.process_inputs
    vllm.v1.engine.llm_engine:LLMEngine.get_supported_tasks
    vllm.v1.worker.gpu_worker:Worker.get_model
    vllm.v1.worker.gpu_worker:Worker.reload_weights
    vllm:LLM.collective_rpc
    vllm:LLM.reset_prefix_cache
    vllm:LLM.sleep
    vllm:LLM.wake_up
""".split()


def check(options: Collection[str]) -> None:
    """Raise ValueError unless the installed vLLM has all names in NEEDED and all these engine `options`."""
    missing = []
    for path in NEEDED:
        try:
            resolve_name(path)
        except (ImportError, AttributeError):
            missing.append(path)
    known = resolve_name("vllm:EngineArgs").__dataclass_fields__
    if missing := missing + [f"EngineArgs.{name}" for name in options if name not in known]:
        version = resolve_name("vllm:__version__")
        raise ValueError(
            f"vLLM {version} lacks {', '.join(missing)}: install another version (0.26 to 0.33 have it), or use "
            "--engine torch."
        )


def tensor_parallel_group() -> Any:
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group()


def run_requests(
    llm: Any,
    requests: list[tuple[list[int], int]],
    n: int,
    params: Any,
    numbers: Iterator[int],
    ended: Callable[[int, list[Completion]], None],
) -> list[list[Completion]]:
    """Sample n completions per (prompt, seed) and call `ended` for each prompt that has all of them.

    This is the loop of `LLM.generate`, except that it takes tokens and log-probs directly from the engine core: vLLM's
    own outputs create several Python objects per token. `numbers` yields request numbers that are unique per engine.
    """
    from vllm.inputs import tokens_input

    front = llm.llm_engine
    core, tasks = front.engine_core, front.get_supported_tasks()
    places: dict[str, tuple[int, int]] = {}  # (prompt, sample) of each open request
    samples = [[Completion([], [], "length") for _ in range(n)] for _ in requests]
    waiting = [n] * len(requests)
    try:
        for prompt, (ids, seed) in enumerate(requests):
            tokens = tokens_input(prompt_token_ids=ids)
            first = front.input_processor.process_inputs("", tokens, params, tasks)
            for i in range(n):
                request = copy(first)
                request.request_id = str(next(numbers))
                request.sampling_params = copy(first.sampling_params)
                request.sampling_params.seed = seed + i
                core.add_request(request)
                places[request.request_id] = (prompt, i)
        while places:
            for output in core.get_output().outputs:
                prompt, i = places[output.request_id]
                sample = samples[prompt][i]
                sample.token_ids.extend(output.new_token_ids)
                if output.new_logprobs is not None:
                    sample.logps.extend(output.new_logprobs.logprobs[:, 0].tolist())
                if output.finish_reason is not None:
                    reason = str(output.finish_reason)
                    assert reason in ("stop", "length") and len(sample.logps) == len(sample.token_ids), reason
                    samples[prompt][i] = replace(sample, finish_reason=reason)
                    del places[output.request_id]
                    waiting[prompt] -= 1
                    if not waiting[prompt]:
                        ended(prompt, samples[prompt])
    finally:
        core.abort_requests(list(places))
    while core.engine_core.scheduler.has_requests() or core.engine_core.batch_queue:
        core.get_output()  # finish steps that were scheduled ahead: none may be in flight when weights change
    return samples


def replace_weights(llm: Any, weights: Iterable[tuple[str, Tensor]]) -> tuple[set[str], dict[str, Checksum | None]]:
    """Load (Hugging Face name, tensor) pairs in place.

    Returns the names of the engine's parameters that the loader reports as written, and the checksum of each parameter.
    The checksum is None if the parameter cannot be read back: it is empty because its weights are kept repacked.
    """
    # Without a separate engine process vLLM calls the function directly, so an iterator can be an argument.
    load = _load_on_gpu if torch.cuda.is_available() else _load_on_cpu
    [(written, model)] = llm.collective_rpc(load, args=(weights,))
    if written is None:
        raise RuntimeError(f"vLLM's {type(model).__name__} does not report which weights it loads: use --engine torch.")
    parameters = dict(model.named_parameters())
    held = checksums({name: parameter for name, parameter in parameters.items() if parameter.numel()})
    return written, dict.fromkeys(parameters) | held


def _load_on_gpu(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> tuple[set[str] | None, nn.Module]:
    model = worker.get_model()
    return model.load_weights(weights), model


def _load_on_cpu(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> tuple[set[str] | None, nn.Module]:
    """On the CPU vLLM keeps linear weights repacked for its kernels; `reload_weights` repacks them layer by layer.

    It does not pass on what `load_weights` returns, so this is recorded here. It also skips a head that is tied to the
    embedding, since no weight of that name is sent; the last loop below repacks the stale head.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    model = worker.get_model()
    load, written = model.load_weights, []

    def recorded(pairs: Iterable[tuple[str, Tensor]]) -> set[str] | None:
        written.append(load(pairs))
        return written[0]

    model.load_weights = recorded
    try:
        worker.reload_weights(weights_iterator=weights)
    finally:
        del model.load_weights
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)
    return written[0], model
