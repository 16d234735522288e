"""Compare the update that computes each prompt once per group with the update that computes it for every completion.

    python -m tests.e2e.shared_prompts MODEL [--shapes 180x200 400x100] [--rounds 3] [--group 8]

One group of random tokens goes through packing and `grpo_core.update.update` (forward, backward, the loss and its
metrics; no clipping and no optimizer step) without a reference model, in float32 on a CPU and bfloat16 on a GPU,
alternately plain and shared. The fastest round of each counts. On a CPU it also prints the CPU seconds of all threads,
which depend less on other programs. The bound is the ratio of FLOPs: blocks over all tokens of the row, attention, and
the head over the scored tokens.
"""

import argparse
import random
import time
from collections.abc import Sequence

import torch

from grpo_core.batch import make_micro_batches
from grpo_core.config import GRPOConfig
from grpo_core.rollout import Sample
from grpo_core.update import update
from kernels import tables
from sft_core.data.packing import step_counts
from sft_core.model.flops import shape, training_flops
from sft_core.model.parallel import Sharding, make_mesh, shard
from sft_core.model.policy import load_policy
from sft_core.run import distributed
from sft_core.run.config import ModelConfig


def make_group(prompt: int, completion: int, group: int, vocab: int) -> list[Sample]:
    rng = random.Random(0)
    ids = [rng.randrange(vocab) for _ in range(prompt)]
    logps = [-5.0] * completion
    return [
        Sample(0, ids, [rng.randrange(vocab) for _ in range(completion)], logps, "stop", 0, advantage=i / group - 0.45)
        for i in range(group)
    ]


def flops(info, lengths: Sequence[int], shared: Sequence[int], scored: int) -> float:
    s = shape(info)
    unscored = sum(lengths) - sum(shared) - scored  # these do not reach the head
    return training_flops(info, lengths, shared) - 6 * s.vocab * s.hidden * unscored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--shapes", nargs="+", default=["180x200", "400x100"], help="prompt x completion, in tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--group", type=int, default=8)
    options = parser.parse_args()

    *_, device = distributed.init_distributed(600)
    policy = load_policy(ModelConfig(options.model))
    info = policy.model.config
    policy = shard(policy, make_mesh(device), Sharding(bf16=device.type == "cuda"))
    config = GRPOConfig("unused", beta=0.0)

    def step(samples: list[Sample], share: bool) -> tuple[float, float]:
        """Wall seconds and CPU seconds of one update."""
        start, used = time.perf_counter(), time.process_time()
        batches = make_micro_batches(samples, config.max_tokens_per_micro_batch, device, share)
        counts = step_counts([batch.sequences for batch in batches], device)
        update(policy, None, batches, counts, config, first_use=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - start, time.process_time() - used
        policy.zero_grad()
        return taken

    rows = []
    for text in options.shapes:
        prompt, completion = map(int, text.split("x"))
        samples = make_group(prompt, completion, options.group, info.vocab_size)
        taken = {share: [step(samples, share)] for share in (False, True)}  # the warm-up
        for _ in range(options.rounds):
            for share, found in taken.items():
                found.append(step(samples, share))
        (plain, plain_used), (shared, shared_used) = (
            [min(times) for times in zip(*taken[k][1:], strict=True)] for k in taken
        )
        lengths, repeated = [prompt + completion] * options.group, [prompt] * (options.group - 1)
        scored = options.group * completion
        bound = flops(info, lengths, [], scored) / flops(info, lengths, repeated, scored)
        row = [f"{prompt} / {completion}", f"{plain:.2f}", f"{shared:.2f}", f"{plain / shared:.2f}"]
        row += [f"{plain_used:.2f} / {shared_used:.2f}", f"{plain_used / shared_used:.2f}", f"{bound:.2f}"]
        rows.append(row)
        print(f"{text}: {taken}", flush=True)
    print(f"{options.model}, G = {options.group}, {torch.get_num_threads()} threads, {device}, {options.rounds} rounds")
    heads = ["prompt / completion", "plain [s]", "shared [s]", "x", "processor [s]", "x", "bound by FLOPs"]
    print(tables.table(heads, rows))
    distributed.shutdown()


if __name__ == "__main__":
    main()
