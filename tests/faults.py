"""Faults that are injected into a run before `main` starts (see `tests/launch.py`)."""

import os
import signal
import time
from dataclasses import replace

import torch

import grpo_core.batch
import grpo_core.config
import grpo_core.train
import grpo_core.update
import sft_core.data.packing
import sft_core.model.policy
import sft_core.sampler
import sft_core.train
from gen.engine.base import Loaded
from gen.engine.torch import TorchEngine
from gen.engine.weight_sync import checksums


def wake_with_the_old_weights():
    """The engine keeps its initial weights and uses them after its sleep."""
    load, slept = TorchEngine.load_weights, []

    def load_weights(self, weights, version):
        if not slept:
            return load(self, weights, version)
        self.version = version
        return Loaded((), {})

    TorchEngine.load_weights, TorchEngine.sleep = load_weights, lambda self: slept.append(setattr(self, "version", -1))


def skip_sync():
    """The engine reports that it has loaded the weights, but has not."""

    def load_weights(self, weights, version):
        self.version = version
        return Loaded((), {})

    TorchEngine.load_weights = load_weights


def drop_a_tensor():
    load = TorchEngine.load_weights
    TorchEngine.load_weights = lambda self, weights, version: load(self, list(weights)[:-1], version)


def untie(engine):
    engine.model.lm_head.weight = torch.nn.Parameter(engine.model.lm_head.weight.detach().clone(), requires_grad=False)


def write_nothing_to_the_head():
    """The engine's head is not tied to the embedding, unlike the policy's."""
    load = TorchEngine.load_weights

    def load_weights(self, weights, version):
        untie(self)
        return load(self, weights, version)

    TorchEngine.load_weights = load_weights


def with_layers_exchanged(load, engine, weights, version):
    """The loader gets the right tensors but swaps two layers. Only the engine's checksums show this."""
    loaded = load(engine, weights, version)
    a, b = engine.model.model.layers[:2]
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        one.data, other.data = other.data, one.data
    return Loaded(loaded.written, checksums(dict(engine.model.named_parameters())), as_sent=True)


def exchange_two_layers():
    load = TorchEngine.load_weights
    TorchEngine.load_weights = lambda *arguments: with_layers_exchanged(load, *arguments)


def swap_two_tensors():
    load = TorchEngine.load_weights

    def load_weights(self, weights, version):
        pairs = dict(weights)
        a, b = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
        pairs[a], pairs[b] = pairs[b], pairs[a]
        return load(self, pairs.items(), version)

    TorchEngine.load_weights = load_weights


def wrong_temperature():
    sample = TorchEngine.sample

    def colder(self, prompts, sampling, *arguments):
        return sample(self, prompts, replace(sampling, temperature=0.9 * sampling.temperature), *arguments)

    TorchEngine.sample = colder


def targets_off_by_one():
    """The policy scores each token from its own hidden state instead of the one before it."""
    pack = sft_core.data.packing.pack_sequences

    def shifted(*arguments):
        packed = pack(*arguments)
        packed.rows = (packed.rows + 1).clamp(max=packed.input_ids.shape[1] - 1)
        return packed

    sft_core.data.packing.pack_sequences = sft_core.model.policy.pack_sequences = grpo_core.batch.pack_sequences = (
        shifted
    )


def mask_the_stop_token():
    """Do not score the last token of any sequence."""
    pack = sft_core.data.packing.pack_sequences
    grpo_core.batch.pack_sequences = lambda sequences, masks, *more: pack(
        sequences, [[*mask[:-1], False] for mask in masks], *more
    )


def nan_in_the_second_step():
    if os.environ.get("RANK", "0") != "0":
        return
    update, token_loss, steps = grpo_core.train.update, grpo_core.update.token_loss, []

    def counted(*arguments):
        steps.append(1)
        return update(*arguments)

    def poisoned(*arguments, **options):
        losses = token_loss(*arguments, **options)
        return lambda *chunk: losses(*chunk) * (torch.nan if len(steps) == 2 else 1.0)

    grpo_core.train.update, grpo_core.update.token_loss = counted, poisoned


def hang_on_the_last_rank():
    if os.environ["RANK"] == "0":
        return
    step_counts = grpo_core.train.step_counts

    def hang(*arguments):
        time.sleep(1000)
        return step_counts(*arguments)

    grpo_core.train.step_counts = hang


def break_the_evaluation():
    def fail(*arguments):
        raise RuntimeError("no evaluation today")

    sft_core.train.evaluate = fail


def terminate_in_the_second_step():
    step_counts, steps = sft_core.train.step_counts, []

    def counted(*arguments):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_counts(*arguments)

    sft_core.train.step_counts = counted


def windows_of_six_rows():
    sft_core.sampler.WINDOW = 6


def skip_no_group():
    """Groups without advantages get forward and backward passes like the others."""
    grpo_core.config.GRPOConfig.skips_groups = False
