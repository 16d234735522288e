"""All of GRPO in one file. Read this first.

GRPO (DeepSeekMath, arXiv:2402.03300) trains a language model on problems whose answers a program can check. The model
writes a group of completions for each problem, and a reward function scores them. Completions that score above the mean
of their group are made more likely, those below it less likely. A clipped ratio keeps several updates on the same
completions from going too far, and a KL penalty keeps the model near the one it started from. There is no value
network: the mean of the group takes its place.

    python -m grpo_core.nano  # a small Llama, in about 3 minutes on 2 CPU cores
    python -m grpo_core.nano --model FOLDER --learning_rate 1e-5 --max_completion_length 128  # a chat model

The problems are arithmetic in words (`quickstart/task.py`). Without --model, a Llama of 2.5 million random weights
first imitates worked demonstrations. One column in five is wrong in them, so imitation alone cannot make the model
reliable; GRPO then trains it to answer correctly. With --model, GRPO starts from the model in that folder.

Not in this file but in `train.py`, whose loop has the same seven phases: multiple devices, a separate inference engine,
packing without padding, log-probs without [B, C, V] logits in memory, reward functions in worker processes with a
timeout, the later losses (DAPO, Dr. GRPO, CISPO, GSPO), learning rate schedules, checkpoints, log files. The two files
share no code, and `tests/grpo_core/test_nano.py` checks that they have the same loss and the same gradients. Read
`loss.py` and `advantage.py` next, then `train.py` and `update.py`.

Shapes: B sequences, P tokens in the longest prompt, C tokens in the longest completion, V tokens in the vocabulary.
"""

import argparse
import copy
import random
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from grpo_core.quickstart.task import Problem as WordProblem
from grpo_core.quickstart.task import make_splits, write_demonstration, write_model

NUM_PROBLEMS = {"heldout": 200, "demonstrations": 700, "train": 800}
WARM_START_STEPS = 150
WARM_START_BATCH_SIZE = 32
WARM_START_LEARNING_RATE = 1e-3
ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.0}
Reward = Callable[[str, str], float]  # completion, answer -> reward


# ---------------------------------------------------------------------------- options
def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    model: str = option("", "folder of a pretrained model and its tokenizer (default: a small Llama)")
    max_steps: int = option(60, "rollout batches to sample and train on")
    prompts_per_step: int = option(16, "problems in a rollout batch")
    num_generations: int = option(8, "completions per problem: the group size")
    max_completion_length: int = option(32, "longest completion in tokens")
    temperature: float = option(1.0, "sampling temperature; all log-probs are computed at it too")
    num_iterations: int = option(1, "updates per rollout batch")
    micro_batch_size: int = option(64, "sequences per forward and backward pass; changes memory, not the result")
    learning_rate: float = option(3e-4, "constant learning rate of AdamW; 1e-5 suits a pretrained model")
    beta: float = option(0.04, "weight of the KL to the reference model; 0: no reference model")
    epsilon: float = option(0.2, "the ratio is clipped to [1 - epsilon, 1 + epsilon]")
    seed: int = option(0, "seed of weights, problems and sampling")

    def __post_init__(self) -> None:
        counts = ("max_steps", "prompts_per_step", "max_completion_length", "num_iterations", "micro_batch_size")
        bounds = dict.fromkeys(counts, 1) | {"num_generations": 2, "beta": 0, "epsilon": 0}
        for name, bound in bounds.items():
            if not getattr(self, name) >= bound:  # not `<`, which would let NaN pass
                raise ValueError(f"--{name} must be at least {bound}, got {getattr(self, name)}")
        for name in ("temperature", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be above 0, got {getattr(self, name)}")
        if self.prompts_per_step > NUM_PROBLEMS["train"]:
            raise ValueError(f"--prompts_per_step must be at most {NUM_PROBLEMS['train']}, got {self.prompts_per_step}")


# ---------------------------------------------------------------------------- problems, samples, batches
@dataclass(frozen=True)
class Problem:
    prompt_ids: list[int]
    answer: str


@dataclass
class Sample:
    """One completion of one prompt."""

    prompt_ids: list[int]
    completion_ids: list[int]  # including the EOS token at its end, if one was sampled
    finish_reason: str  # "stop", or "length" if the completion was cut at max_completion_length
    advantage: float = 0.0


@dataclass
class Batch:
    """B samples as tensors."""

    input_ids: Tensor  # [B, P + C] int64: prompts padded on the left, completions padded on the right
    attention_mask: Tensor  # [B, P + C] int64: 1 for a token, 0 for padding
    completion_mask: Tensor  # [B, C] bool: True for a token (EOS included), False for padding
    advantages: Tensor  # [B]
    old_logps: Tensor = field(init=False)  # [B, C] of the policy before its first update (`set_old_and_ref_logps`)
    ref_logps: Tensor | None = field(init=False)  # [B, C] of the reference model; None: no KL


def pad(prompts: list[list[int]], completions: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, both [B, P + C], in which all completions begin in the same column.

    >>> pad([[5, 6], [7]], [[8], [9, 10]], device="cpu")
    (tensor([[ 5,  6,  8,  0],
            [ 0,  7,  9, 10]]), tensor([[1, 1, 1, 0],
            [0, 1, 1, 1]]))

    The mask is made from the lengths, not from the ids, because the id 0 may also be a real token.
    """
    longest_prompt = max(len(prompt) for prompt in prompts)  # P
    longest_completion = max(len(completion) for completion in completions)  # C
    input_ids, attention_mask = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        left = [0] * (longest_prompt - len(prompt))
        right = [0] * (longest_completion - len(completion))
        input_ids.append(left + prompt + completion + right)
        attention_mask.append(left + [1] * len(prompt + completion) + right)
    return torch.tensor(input_ids, device=device), torch.tensor(attention_mask, device=device)


def make_batches(samples: list[Sample], micro_batch_size: int, device: torch.device) -> list[Batch]:
    """The samples, in order, as micro-batches."""
    batches = []
    for start in range(0, len(samples), micro_batch_size):
        part = samples[start : start + micro_batch_size]
        prompts = [s.prompt_ids for s in part]
        completions = [s.completion_ids for s in part]
        input_ids, attention_mask = pad(prompts, completions, device)
        longest_completion = max(len(completion) for completion in completions)  # C
        completion_mask = attention_mask[:, -longest_completion:].bool()
        advantages = torch.tensor([s.advantage for s in part], device=device)
        batches.append(Batch(input_ids, attention_mask, completion_mask, advantages))
    return batches


# ---------------------------------------------------------------------------- sampling
def positions(attention_mask: Tensor) -> Tensor:  # [B, T] -> [B, T]
    """Each token's position, counted from the first real token of its row, so padding on the left shifts none."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


@torch.no_grad()
def sample(model: Any, prompts: list[list[int]], eos_id: int, max_length: int, temperature: float) -> list[Sample]:
    """Complete each prompt up to EOS or max_length, from softmax(logits / temperature); temperature 0 is greedy.

    The first pass reads the prompts. Each later one reads only the newest token of every sequence, and takes the keys
    and values of the earlier ones from the cache. A sequence that has ended stays in the batch until all have ended;
    tokens sampled after its end are dropped.
    """
    device = model.device
    input_ids, attention_mask = pad(prompts, [[] for _ in prompts], device)  # [B, P], [B, P]
    position_ids = positions(attention_mask)  # [B, P]
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)  # [B]
    lengths = torch.zeros(len(prompts), dtype=torch.int64, device=device)  # [B]
    columns = []
    cache = None
    for _ in range(max_length):
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1]  # [B, V]
        if temperature == 0:
            tokens = logits.argmax(dim=-1)  # [B]
        else:
            tokens = torch.multinomial((logits / temperature).softmax(dim=-1), num_samples=1)[:, 0]  # [B]
        columns.append(tokens)
        lengths += ~ended  # before `ended` is updated, so that EOS counts
        ended |= tokens == eos_id
        if ended.all():
            break
        cache = output.past_key_values
        input_ids = tokens[:, None]  # [B, 1]
        attention_mask = torch.cat([attention_mask, torch.ones_like(input_ids)], dim=1)
        position_ids = position_ids[:, -1:] + 1  # [B, 1]
    completions = torch.stack(columns, dim=1).tolist()  # [B, C]
    samples = []
    for i, prompt in enumerate(prompts):
        finish_reason = "stop" if ended[i] else "length"
        samples.append(Sample(prompt, completions[i][: int(lengths[i])], finish_reason))
    return samples


# ---------------------------------------------------------------------------- the algorithm
def last_number_reward(completion: str, answer: str) -> float:
    """1 if the last number of the completion is the answer, else 0."""
    return 1.0 if re.findall(r"\d+", completion)[-1:] == [answer] else 0.0


def group_advantages(rewards: list[float]) -> list[float]:
    """How many standard deviations each reward of a group lies above the group's mean.

    >>> [round(advantage, 2) for advantage in group_advantages([1.0, 0.0, 0.0, 1.0])]
    [0.87, -0.87, -0.87, 0.87]

    Exactly 0 if all rewards are equal: such a group does not show which completion is better.
    """
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    values = torch.tensor(rewards, dtype=torch.float64)
    return ((values - values.mean()) / (values.std() + 1e-4)).tolist()  # std divides by the group's size - 1


def completion_logps(model: Any, batch: Batch, temperature: float) -> Tensor:  # [B, C]
    """The log-prob of each token of each completion, given all tokens before it; 0 for padding.

    Logits are divided by the temperature, because completions were sampled from that distribution. Weights and logits
    are float32: in bfloat16 a log-prob would be off by about 0.02.
    """
    length = batch.completion_mask.shape[1]  # C
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=positions(batch.attention_mask),
        use_cache=False,
        logits_to_keep=length + 1,
    )
    logits = output.logits[:, -length - 1 : -1] / temperature  # [B, C, V]; a token is predicted one column before it
    targets = batch.input_ids[:, -length:]  # [B, C]
    logps = logits.log_softmax(dim=-1).gather(dim=-1, index=targets[:, :, None])[:, :, 0]  # [B, C]
    return logps.masked_fill(~batch.completion_mask, 0.0)


def grpo_loss(
    logps: Tensor,  # [B, C] of the policy, with gradient
    batch: Batch,
    num_sequences: int,  # of the whole update, over all its micro-batches
    beta: float,
    epsilon: float,
) -> tuple[Tensor, dict[str, Tensor]]:  # [], name -> []
    """This micro-batch's share of the loss and of the metrics; the shares of all micro-batches add up.

    ratio r    exp(logp - old_logp): how much more likely the token is than when it was sampled; 1 in the first update
    policy     -min(r A, clip(r, 1 - epsilon, 1 + epsilon) A): no gradient above the range if A > 0, below it if A < 0
    KL         exp(d) - d - 1 with d = ref_logp - logp: never negative, and on average KL(policy || reference) ("k3")
    weight     1 / (num_sequences * length of its sequence): the mean over a sequence's tokens, then over sequences
    """
    advantages = batch.advantages[:, None]  # [B, 1]
    ratios = (logps - batch.old_logps).exp()  # [B, C]
    unclipped = ratios * advantages  # [B, C]
    clipped = ratios.clamp(1 - epsilon, 1 + epsilon) * advantages  # [B, C]
    policy_losses = -torch.min(unclipped, clipped)  # [B, C]
    kl = torch.zeros_like(logps)  # [B, C]
    if batch.ref_logps is not None:
        difference = batch.ref_logps - logps  # [B, C]
        kl = difference.exp() - difference - 1

    lengths = batch.completion_mask.sum(dim=1, keepdim=True)  # [B, 1]
    weights = batch.completion_mask / (num_sequences * lengths)  # [B, C], 0 for padding
    loss = (weights * (policy_losses + beta * kl)).sum()
    metrics = {
        "loss": loss.detach(),
        "kl": (weights * kl).sum().detach(),
        "clipped": (weights * (clipped < unclipped)).sum(),  # weighted share of tokens without gradient, by the clip
        "nll": -(weights * logps).sum().detach(),  # estimates the policy's entropy if the policy sampled the tokens
    }
    return loss, metrics


@torch.no_grad()
def set_old_and_ref_logps(batches: list[Batch], model: Any, reference: Any, temperature: float) -> None:
    """Compute the samples' log-probs under the current policy, and under the reference model if there is one."""
    for batch in batches:
        batch.old_logps = completion_logps(model, batch, temperature)
        batch.ref_logps = None if reference is None else completion_logps(reference, batch, temperature)


def add_gradients(model: Any, batches: list[Batch], num_sequences: int, config: Config) -> dict[str, float]:
    """Add the gradient of the loss over all micro-batches to the model's gradient. Returns the metrics."""
    totals: dict[str, float] = {}
    for batch in batches:
        logps = completion_logps(model, batch, config.temperature)  # [B, C]
        loss, metrics = grpo_loss(logps, batch, num_sequences, config.beta, config.epsilon)
        loss.backward()
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals


def optimizer_step(model: Any, optimizer: torch.optim.Optimizer) -> float:
    """Clip the gradient, take a step, return the norm. Raises RuntimeError, before the step, if it is not finite."""
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad()
    return float(grad_norm)


# ---------------------------------------------------------------------------- the loop
def train(config: Config, model: Any, tokenizer: Any, problems: list[Problem], reward: Reward) -> list[float]:
    """GRPO, in the seven phases of `grpo_core/train.py`. Returns the mean reward of each step."""
    reference = copy.deepcopy(model) if config.beta > 0 else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, **ADAMW)
    rng = random.Random(config.seed)
    history = []
    for step in range(1, config.max_steps + 1):
        start = time.perf_counter()

        # 1 sync: nothing to do, since the model that is trained also samples

        # 2 sample and score: a group of completions for each problem
        chosen = [p for p in rng.sample(problems, config.prompts_per_step) for _ in range(config.num_generations)]
        prompts = [problem.prompt_ids for problem in chosen]
        samples = sample(model, prompts, tokenizer.eos_token_id, config.max_completion_length, config.temperature)
        texts = tokenizer.batch_decode([s.completion_ids for s in samples], skip_special_tokens=True)
        rewards = [reward(text, problem.answer) for text, problem in zip(texts, chosen, strict=True)]

        # 3 advantage: each completion against the others of its group
        advantages = []
        for first in range(0, len(rewards), config.num_generations):
            advantages += group_advantages(rewards[first : first + config.num_generations])
        for s, advantage in zip(samples, advantages, strict=True):
            s.advantage = advantage

        # 4 pack: into micro-batches, with the log-probs that stay fixed during the updates
        batches = make_batches(samples, config.micro_batch_size, model.device)
        set_old_and_ref_logps(batches, model, reference, config.temperature)

        # 5 denominators: the loss is divided by totals of the whole step, not of a micro-batch
        num_sequences = len(samples)

        # 6 update
        for _ in range(config.num_iterations):
            metrics = add_gradients(model, batches, num_sequences, config)
            grad_norm = optimizer_step(model, optimizer)

        # 7 log: metrics of the last update; if there is only one, loss = beta * kl, because advantages sum to 0
        history.append(sum(rewards) / len(rewards))
        length = sum(len(s.completion_ids) for s in samples) / len(samples)
        cut = sum(s.finish_reason == "length" for s in samples) / len(samples)
        print(
            f"step {step}/{config.max_steps}  reward {history[-1]:.3f}  "
            + "".join(f"{name} {value:.4f}  " for name, value in metrics.items())
            + f"grad_norm {grad_norm:.2f}  length {length:.1f}  cut {cut:.2f}  {time.perf_counter() - start:.1f} s",
            flush=True,
        )
    return history


def warm_start(config: Config, model: Any, demonstrations: list[Sample]) -> None:
    """Imitate the demonstrations with the same update, advantage 1 and no reference model.

    The ratio is exp(logp - old_logp) = 1, so the gradient of -ratio is that of -logp: this is maximum likelihood.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARM_START_LEARNING_RATE, **ADAMW)
    rng = random.Random(config.seed)
    for step in range(1, WARM_START_STEPS + 1):
        samples = rng.sample(demonstrations, WARM_START_BATCH_SIZE)
        batches = make_batches(samples, config.micro_batch_size, model.device)
        set_old_and_ref_logps(batches, model, None, config.temperature)
        metrics = add_gradients(model, batches, len(samples), config)
        optimizer_step(model, optimizer)
        if step % 25 == 0:
            print(f"warm start {step}/{WARM_START_STEPS}  nll {metrics['nll']:.3f}", flush=True)


# ---------------------------------------------------------------------------- from the command line to a trained model
def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder. Raises ValueError if GRPO cannot start from that folder."""
    for needed in ("config.json", "tokenizer_config.json", "*.safetensors"):
        if not any(folder.glob(needed)):
            raise ValueError(f"--model must be a folder with a model and its tokenizer, but {folder} has no {needed}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {folder} lacks a chat template or an EOS token: give another --model")
    return tokenizer


def render(tokenizer: Any, problem: WordProblem) -> Problem:
    """The problem through the chat template, up to where the assistant's answer begins."""
    messages = [{"role": "user", "content": problem.text}]
    prompt_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return Problem(prompt_ids, str(problem.answer))


def check_lengths(folder: Path, problems: list[Problem], max_completion_length: int) -> None:
    """Raise ValueError if a prompt and its completion could exceed the number of positions of the model."""
    limit = getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None)
    longest = max(len(problem.prompt_ids) for problem in problems)
    if limit is not None and longest + max_completion_length > limit:
        raise ValueError(
            f"--max_completion_length must be at most {limit - longest}, got {max_completion_length}: "
            f"the model has {limit} positions, and the longest prompt takes {longest}"
        )


def demonstrate(tokenizer: Any, problem: WordProblem, rng: random.Random) -> Sample:
    """A sample whose completion is a worked solution of the problem."""
    solution = write_demonstration(problem, rng, slips=0.2)
    completion_ids = tokenizer.encode(solution, add_special_tokens=False) + [tokenizer.eos_token_id]
    return Sample(render(tokenizer, problem).prompt_ids, completion_ids, "stop", advantage=1.0)


def evaluate(config: Config, model: Any, tokenizer: Any, problems: list[Problem]) -> float:
    """The share of problems solved by greedy decoding."""
    prompts = [problem.prompt_ids for problem in problems]
    samples = sample(model, prompts, tokenizer.eos_token_id, config.max_completion_length, temperature=0)
    texts = tokenizer.batch_decode([s.completion_ids for s in samples], skip_special_tokens=True)
    return sum(last_number_reward(text, p.answer) for text, p in zip(texts, problems, strict=True)) / len(problems)


def main(argv: list[str] | None = None) -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        parser.add_argument(f"--{f.name}", type=type(f.default), default=f.default, help=f.metadata["help"])
    with tempfile.TemporaryDirectory() as scratch:
        try:
            config = Config(**vars(parser.parse_args(argv)))
            folder = Path(config.model or write_model(scratch, config.seed)).expanduser()
            tokenizer = load_tokenizer(folder)
            splits = make_splits(config.seed, NUM_PROBLEMS)
            problems = [render(tokenizer, problem) for problem in splits["train"]]
            heldout = [render(tokenizer, problem) for problem in splits["heldout"]]
            check_lengths(folder, problems + heldout, config.max_completion_length)
        except ValueError as error:
            parser.exit(2, f"{error}\n")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.eval()  # no dropout: it would make the policy in training differ from the policy that samples
    torch.manual_seed(config.seed)

    if not config.model:
        rng = random.Random(config.seed)
        warm_start(config, model, [demonstrate(tokenizer, problem, rng) for problem in splits["demonstrations"]])
    before = evaluate(config, model, tokenizer, heldout)
    train(config, model, tokenizer, problems, last_number_reward)
    after = evaluate(config, model, tokenizer, heldout)
    print(f"{len(heldout)} held-out problems, greedy: {before:.1%} right before GRPO, {after:.1%} after")
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
