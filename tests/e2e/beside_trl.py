"""A whole GRPO step beside TRL 1.16.0's GRPOTrainer: same model, prompts, reward and lengths; seconds and memory.

    python tests/e2e/beside_trl.py MODEL [--turns 2] [--liger] [--trl_python /tmp/trl/bin/python] [our own options]
    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.16.0     (where TRL needs an environment of its own)

On a GPU both sample with vLLM in the trainer's process, with the same share of memory, and compute in bfloat16; TRL
keeps its defaults but for gradient checkpointing, which is off on both sides. Without a GPU neither samples with vLLM
(ours does with `--engine vllm`), and all is float32: `--prompts 4 --completions 8 --tokens 64` takes six minutes on two
cores. Stop ids are ignored: every completion has --tokens tokens. A step is timed from the end of one optimizer step to
the end of the next, all that lies between included. `outside`: the peak of what torch has allocated since vLLM started,
less what vLLM allocated then; `device`: the most that was in use on the card at the end of a step. Each side has a
process of its own, one after the other, --turns times. Options not known here go to grpo_core.train.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "vllm", "trl", "liger-kernel")
SHARE, RATE, LONGEST_PROMPT, GIB = 0.3, 1e-6, 128, 2**30


def share_of_e(completions: list[Any], **columns: Any) -> list[float]:
    """The reward of both."""
    return [text.count("e") / max(1, len(text)) for text in (completion[0]["content"] for completion in completions)]


class Meter:
    """Ends of optimizer steps, and memory."""

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda if torch.cuda.is_available() else None
        self.ends, self.engine, self.device = list[float](), 0, 0  # s, bytes, bytes

    def end_of_step(self) -> None:
        if self.cuda:
            self.cuda.synchronize()
            free, total = self.cuda.mem_get_info()
            self.device = max(self.device, total - free)
        self.ends.append(time.perf_counter())

    def starts_engine(self, function: Callable) -> Callable:
        def start(*arguments: Any, **options: Any) -> Any:
            before = self.cuda.memory_allocated() if self.cuda else 0
            result = function(*arguments, **options)
            if self.cuda:
                self.engine = self.cuda.memory_allocated() - before
                self.cuda.reset_peak_memory_stats()
            return result

        return start

    def result(self, steps: int, **more: Any) -> dict[str, Any]:
        peak = self.cuda.max_memory_allocated() if self.cuda else 0
        gib = {"outside": (peak - self.engine) / GIB, "engine": self.engine / GIB, "device": self.device / GIB}
        seconds = [b - a for a, b in itertools.pairwise(self.ends)][-steps:]
        every = list(importlib.metadata.distributions())[::-1]  # of a name the first on the path counts
        packages = {d.metadata["Name"].replace("_", "-"): d.version for d in every}
        versions = ", ".join(f"{name} {packages[name]}" for name in PACKAGES if name in packages)
        card = self.cuda.get_device_name() if self.cuda else "CPU"
        return {"seconds": seconds, "gib": gib, "card": card, "versions": versions} | more


def ours(options: argparse.Namespace, folder: Path, more: list[str]) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT))
    import torch

    from grpo_core import train as trainer
    from grpo_core.setup import prepare

    arguments = {
        "model_name_or_path": options.model, "dataset_name": folder / "prompts.jsonl", "output_dir": folder / "ours",
        "overwrite_output_dir": True, "system_prompt": "", "reward_funcs": "tests.e2e.beside_trl:share_of_e",
        "prompts_per_step": options.prompts, "num_generations": options.completions, "learning_rate": RATE, "beta": 0,
        "max_prompt_length": LONGEST_PROMPT, "max_completion_length": options.tokens, "save_strategy": "no",
        "max_steps": options.warm_up + options.steps, "vllm_gpu_memory_utilization": SHARE, "report_to": "none",
        "engine": "vllm" if torch.cuda.is_available() else "torch",
    }  # fmt: skip
    meter, step = Meter(), trainer.guarded_step

    def timed_step(*arguments: Any) -> float:
        rate = step(*arguments)
        meter.end_of_step()
        return rate

    trainer.guarded_step, trainer.start_engine = timed_step, meter.starts_engine(trainer.start_engine)
    run = prepare([f"--{name}={value}" for name, value in arguments.items()] + more)
    trainer.train(dataclasses.replace(run, stop_ids=frozenset()))
    rows = [json.loads(line) for line in (folder / "ours" / "metrics.jsonl").read_text().splitlines()][-options.steps :]
    phases = {name: statistics.mean(row[name] for row in rows) for name in rows[0] if name.startswith("time/")}
    mismatch = statistics.mean(row["sampling/sampling_logp_difference/mean"] for row in rows)
    length = statistics.mean(row["completions/mean_length"] for row in rows)
    return meter.result(options.steps, phases=phases, mismatch=mismatch, length=length)


def trl(options: argparse.Namespace, folder: Path, liger: bool) -> dict[str, Any] | None:
    if not importlib.util.find_spec("trl") or (liger and not importlib.util.find_spec("liger_kernel")):
        return None
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    meter, on_gpu = Meter(), torch.cuda.is_available()
    if on_gpu:
        import vllm

        vllm.LLM.__init__ = meter.starts_engine(vllm.LLM.__init__)

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            meter.end_of_step()

    sequences = options.prompts * options.completions
    per_device = min(options.per_device, sequences)
    config = GRPOConfig(
        output_dir=str(folder / "trl"), max_steps=options.warm_up + options.steps, learning_rate=RATE, beta=0.0,
        per_device_train_batch_size=per_device, gradient_accumulation_steps=sequences // per_device, bf16=on_gpu,
        num_generations=options.completions, max_completion_length=options.tokens, loss_type="grpo",
        gradient_checkpointing=False, use_liger_kernel=liger, use_cpu=not on_gpu, use_vllm=on_gpu, vllm_mode="colocate",
        vllm_gpu_memory_utilization=SHARE, vllm_max_model_length=LONGEST_PROMPT + options.tokens,
        generation_kwargs={"ignore_eos": True} if on_gpu else {"min_new_tokens": options.tokens},
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    trainer = GRPOTrainer(options.model, share_of_e, config, Dataset.from_list(rows), callbacks=[Clock()])
    trainer.train()
    logged = [row for row in trainer.state.log_history if "completions/mean_length" in row][-options.steps :]
    length = statistics.mean(row["completions/mean_length"] for row in logged)
    dtype = str(next(trainer.model.parameters()).dtype).removeprefix("torch.")
    return meter.result(options.steps, dtype=dtype, length=length)


def start(side: str, options: argparse.Namespace, argv: list[str]) -> dict[str, Any] | None:
    """What the side found in a process of its own; None: it is not installed. RuntimeError where it failed."""
    python = sys.executable if side == "ours" else options.trl_python
    done = subprocess.run([python, __file__, *argv, "--side", side], capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not found:
        raise RuntimeError(f"{side} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return json.loads(found[-1].removeprefix("RESULT "))


def report(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace, more: list[str]) -> str:
    sys.path.insert(0, str(ROOT))
    from kernels.bench import verdict

    tokens, nan = options.prompts * options.completions * options.tokens, float("nan")
    lines = ["| side | s a step: median | every step | tokens/s | GiB outside | vLLM's | device | parameters |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    medians, on_gpu = dict[str, float](), all(r["card"] != "CPU" for results in found.values() for r in results)
    for side, results in found.items():
        seconds = [second for result in results for second in result["seconds"]]
        medians[side] = statistics.median(seconds)
        gib = [max(result["gib"][name] for result in results) for name in ("outside", "engine", "device")]
        cells = [f"{medians[side]:.2f}", " ".join(f"{second:.2f}" for second in seconds),
                 f"{tokens / medians[side]:,.0f}", *(f"{x:.1f}" if on_gpu else "-" for x in gib),
                 results[0].get("dtype", "float32 masters")]  # fmt: skip
        lines.append(f"| {side} | {' | '.join(cells)} |")
        assert all(result["length"] == options.tokens for result in results), f"{side}: some completions ended early"
    first = found["ours"][0]
    phases = ", ".join(f"{name.removeprefix('time/')} {seconds:.3f}" for name, seconds in first["phases"].items())
    versions = "; ".join(f"{side}: {results[0]['versions']}" for side, results in found.items())
    ratio, outside = medians["ours"] / medians.get("TRL", nan), max(r["gib"]["outside"] for r in found["ours"])
    shape = f"{options.prompts} x {options.completions} completions of {options.tokens} tokens"
    head = [f"{first['card']}; {versions}", shape + ("" if on_gpu else "; no GPU, so TRL samples without vLLM"),
            f"our own options: {' '.join(more) or 'none'}", ""]  # fmt: skip
    lines += ["", f"our phases, s: {phases}; sampler and policy differ by {first['mismatch']:.4f} in a log-prob (mean)"]
    lines.append(f"our time over TRL's: {ratio:.3f}" + ("" if "TRL" in found else " (there is no TRL)"))
    if on_gpu:
        lines.append(verdict("whole step, our time over TRL's", [ratio], [0.4]))
        lines.append(verdict("whole step, GiB outside vLLM's share", [outside], [12.0]))
    return "\n".join([*head, *lines])


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("model", help="folder or Hub id of a chat model")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm_up", type=int, default=2)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--per_device", type=int, default=64, help="TRL's per_device_train_batch_size")
    parser.add_argument("--liger", action="store_true", help="TRL with Liger's kernels too")
    parser.add_argument("--trl_python", default=sys.executable)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--side", choices=["ours", "TRL", "TRL, Liger"])
    options, more = parser.parse_known_args(argv)
    if options.side:
        result = ours(options, options.folder, more) if options.side == "ours" else trl(
            options, options.folder, options.side.endswith("Liger"))  # fmt: skip
        return print(f"RESULT {json.dumps(result)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        write_prompts(folder / "prompts.jsonl", options.prompts * (options.warm_up + options.steps))
        found, failed = dict[str, list[dict[str, Any]]](), False
        for side in ["ours", "TRL", *["TRL, Liger"] * options.liger] * options.turns:
            try:
                result = start(side, options, [*argv, "--folder", str(folder)])
            except RuntimeError as error:  # what the others found is shown all the same
                print(error)
                failed = True
            else:
                found |= {side: [*found.get(side, []), result]} if result else {}
        if "ours" in found:
            print(report(found, options, more))
        sys.exit(failed)


def write_prompts(path: Path, count: int) -> None:
    texts = [f"Ben has {10 + i} pens, buys {3 + i % 7} more and gives {1 + i % 5} away. How many are left?"
             for i in range(count)]  # fmt: skip
    path.write_text("".join(json.dumps({"prompt": [{"role": "user", "content": text}]}) + "\n" for text in texts))


if __name__ == "__main__":
    main()
