"""Ends a complete run: writes results, benchmarks, state and model card to output_dir, and pushes to the Hub.

It runs on the first rank only, after engine, workers and process group are closed, so benchmarks have the machine free.
"""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sft_core.run.benchmarks import FAILURES, run_benchmarks
from sft_core.run.files import write_atomically
from sft_core.run.hub import push_final
from sft_core.run.model_card import write_model_card
from sft_core.run.output_dir import FINISHED


def finish(training: Any, push: bool) -> None:
    """`training`: a complete `sft_core.lifecycle.TrainingRun`; `push`: whether push_to_hub may push to main now."""
    config, progress, results = training.config, training.progress, training.results()
    folder = Path(config.output_dir)
    save_results(folder, "train", results)
    if progress.eval_metrics:
        save_results(folder, "eval", progress.eval_metrics)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    benchmarks: dict[str, float] = {}
    if config.benchmarks:
        try:
            measured = folder / "merged" if training.run.model.use_peft else folder
            benchmarks = run_benchmarks(measured, config, folder / "benchmarks" / f"step-{progress.step}")
        except FAILURES as error:  # the model is complete: its card and its push still follow
            training.failures.append(f"benchmarks of the final model: {error}")
        else:
            training.record(progress.step, benchmarks)
            save_results(folder, "benchmarks", benchmarks)
    for callback in training.callbacks:
        training.failures += callback.close()
        for step, measured_then in callback.results:
            training.record(step, measured_then)
    training.write_state(folder)
    write_model_card(folder, training.run, results | progress.eval_metrics | benchmarks)
    if config.push_to_hub and push or config.push_to_hub_revision:
        training.failures += push_final(config if push else replace(config, push_to_hub=False), folder)
    if not training.failures:
        write_atomically(folder / FINISHED, json.dumps(training.run.identity))
    for failure in training.failures:
        print(f"failed: {failure}", file=sys.stderr)
    curves = f"tensorboard --logdir {folder}" if "tensorboard" in config.report_to else folder / "metrics.jsonl"
    print(f"finished: the model is in {folder}, its card is {folder / 'README.md'}; curves: {curves}")


def save_results(folder: Path, split: str, results: dict[str, float], combined: bool = True) -> None:
    """Write <split>_results.json, and with `combined` add the same metrics to all_results.json."""
    everything = folder / "all_results.json"
    files = {folder / f"{split}_results.json": results}
    if combined:
        files[everything] = (json.loads(everything.read_text()) if everything.is_file() else {}) | results
    for path, values in files.items():
        write_atomically(path, json.dumps(values, indent=4, sort_keys=True) + "\n")
