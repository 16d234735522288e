"""All that this project touches of vLLM beyond `LLM` and `SamplingParams`, in one place.

vLLM promises nothing about it from version to version: `check_package` and `check_engine` look when an engine starts,
so that another vLLM is refused in one sentence and not by a traceback in the middle of a run. Read in the sources of
0.26, 0.32 and 0.33; run with 0.26 and 0.32.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gen.engine import Completion
from gen.sync import Checksums

READ = "0.26 to 0.33"
IMPORTED = {  # module -> names
    "vllm.inputs": ["tokens_input"],
    "vllm.engine.arg_utils": ["EngineArgs"],
    "vllm.distributed.parallel_state": ["get_tp_group"],
    "vllm.model_executor.layers.vocab_parallel_embedding": ["ParallelLMHead"],
}
REACHED = (  # from an `LLM`
    "collective_rpc", "reset_prefix_cache", "sleep", "wake_up", "llm_engine.get_supported_tasks",
    "llm_engine.input_processor.process_inputs", "llm_engine.engine_core.add_request",
    "llm_engine.engine_core.get_output", "llm_engine.engine_core.abort_requests", "llm_engine.engine_core.shutdown",
    "llm_engine.engine_core.engine_core.scheduler.has_requests", "llm_engine.engine_core.engine_core.batch_queue",
)  # fmt: skip
INPUTS = ["request_id", "prompt", "params", "supported_tasks"]  # the first parameters of process_inputs


def check_package(options: Collection[str]) -> None:
    """Raise ValueError unless the installed vLLM has what is imported from it and the engine `options`."""
    missing = []
    for module, names in IMPORTED.items():
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            missing.append(module)
        else:
            missing += [f"{module}.{name}" for name in names if not hasattr(found, name)]
    if not missing:
        from vllm.engine.arg_utils import EngineArgs

        known = {field.name for field in dataclasses.fields(EngineArgs)}
        missing = [f"the option {name}" for name in options if name not in known]
    _refuse(missing)


def check_engine(llm: Any) -> None:
    """Raise ValueError unless the started engine has what is reached in it."""
    _refuse([path for path in REACHED if not _has(llm, path)])
    parameters = list(inspect.signature(llm.llm_engine.input_processor.process_inputs).parameters)
    _refuse([] if parameters[:4] == INPUTS else [f"process_inputs({', '.join(INPUTS)})"])


def _has(start: Any, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(start, name):
            return False
        start = getattr(start, name)
    return True


def _refuse(missing: list[str]) -> None:
    if missing:
        import vllm

        raise ValueError(
            f"vLLM {vllm.__version__} lacks {', '.join(missing)}, which the engine needs: install another version "
            f"({READ} have it), or use --engine torch."
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
    """Sample n completions of each (prompt, seed); `ended` is called with each prompt that has all of them.

    The loop of `LLM.generate`, but tokens and log-probs are taken as the core gives them: vLLM's own outputs, a few
    Python objects a token, take longer than a small model's pass on a GPU (`python -m gen.bench_engine`). `numbers`
    are those of the requests: none may come twice in an engine's life.
    """
    from vllm.inputs import tokens_input

    front = llm.llm_engine
    core, tasks = front.engine_core, front.get_supported_tasks()
    places: dict[str, tuple[int, int]] = {}  # of the open requests
    samples = [[Completion([], [], "length") for _ in range(n)] for _ in requests]
    waiting = [n] * len(requests)
    try:
        for prompt, (ids, seed) in enumerate(requests):
            first = front.input_processor.process_inputs("", tokens_input(prompt_token_ids=ids), params, tasks)
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
        core.get_output()  # of steps that were scheduled ahead: nothing is in flight when weights change
    return samples


def replace_weights(llm: Any, weights: Iterable[tuple[str, Tensor]]) -> tuple[frozenset[str], Mapping[str, Any]]:
    """Load (Hugging Face name, tensor) pairs in place.

    Returns the names of the engine's parameters that the loader says it wrote, and the checksum of each of the engine's
    parameters that can be read back, None of the others.
    """
    # Without a separate engine process vLLM calls the function directly, so an iterator may be an argument.
    [(written, model)] = llm.collective_rpc(
        _load_on_gpu if torch.cuda.is_available() else _load_on_cpu, args=(weights,)
    )
    if written is None:
        raise RuntimeError(f"vLLM's loader of {type(model).__name__} does not say what it wrote: use --engine torch.")
    held, names = Checksums(), [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        if parameter.numel():  # else the weights lie elsewhere, repacked
            held.add(name, parameter)
    found = held.read()
    return frozenset(written), {name: found.get(name) for name in names}


def _load_on_gpu(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> tuple[set[str] | None, nn.Module]:
    model = worker.get_model()
    return model.load_weights(weights), model


def _load_on_cpu(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> tuple[set[str] | None, nn.Module]:
    """On the CPU linear weights live repacked in a kernel's own format, which reload_weights rebuilds layer by layer.

    It keeps to itself what `load_weights` returns. And it skips a head that is tied to the embedding, since no weight
    of that name arrives: without the last step the head would keep the packed copy of the old embedding.
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
