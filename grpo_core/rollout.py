"""Prompts, the completions sampled from them and their rewards, and recordings of all three for replay.

Training uses the token ids that the engine sampled. They are never decoded and tokenised again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from eval.workers import WorkerPool
from gen.engine.base import Completion, Engine, Sampling
from grpo_core.advantage import decoupled_advantages, group_advantages
from grpo_core.config import SYSTEM_PROMPT, GRPOConfig, GRPOScriptArguments
from grpo_core.scoring import BEFORE, Scores, ToScore, start_scoring
from sft_core.data.conversation import options_of, prompt_of, render_prompt, shows_system, text_of, with_system
from sft_core.data.rows import json_lines
from sft_core.run.files import whole_file
from sft_core.run.options import require

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


@dataclass(frozen=True)
class Prompt:
    messages: list[dict[str, Any]] | str  # raw text only from a trainer class
    ids: list[int]
    columns: dict[str, Any]  # the data's other columns, for the rewards


@dataclass
class Sample:
    """One completion of one prompt, L tokens long."""

    group: int  # index of its prompt in the step, over all ranks
    prompt_ids: list[int]
    completion_ids: list[int]  # [L], including the stop token if one was sampled
    sampler_logps: list[float]  # [L], float32 values, at the sampling temperature
    finish_reason: str  # "stop" or "length"
    version: int  # the policy's number of optimizer steps when it sampled this
    reward: float = math.nan  # NaN: not scored
    rewards: list[float] = field(default_factory=list)  # one per reward function; NaN: does not apply
    advantage: float = 0.0
    index: int = 0  # among the completions of its prompt
    # Set only between updates on the same rollout batch:
    old_logps: list[float] | None = None  # [L]
    ref_logps: list[float] | None = None  # [L]


def load_prompts(
    rows: Dataset,
    arguments: GRPOScriptArguments,
    config: GRPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    file: str = "",
    chosen: list[int] | None = None,
    needy: Sequence[str] = (),
    as_given: bool = False,
) -> tuple[list[Prompt], str]:
    """The prompts of the rows `chosen` (None: all) as token ids, and a text on those left out as too long. If `file` is
    JSON lines, rewards get the values written there, because `datasets` converts some text to numbers or times.

    `needy`: names of the rewards that need a gold answer. `as_given`, for trainer classes: a text is the prompt itself,
    without chat template, and no system prompt is added.

    Raises:
        ValueError: the prompt column or the answer column that a reward needs is missing, a row is not a prompt, the
            chat template drops a prompt or the system prompt, or no prompt is short enough.
    """
    column = prompt_column(rows, arguments)
    written = json_lines(file)
    assert len(written) in (0, len(rows)), f"the rows were not read from {file}"
    indices = range(len(rows)) if chosen is None else chosen
    rows = rows.select(indices)
    if needy and not {"solution", "answer"} & set(rows.column_names):
        raise ValueError(
            f"{needy[0]} needs a column `solution` or `answer`; the data has {', '.join(rows.column_names)}: add one."
        )
    system = "" if as_given else SYSTEM_PROMPT if config.system_prompt is None else config.system_prompt
    role = "system" if not system or shows_system(tokenizer) else "user"
    require(
        as_given or role == "system" or config.system_prompt is None,
        "the chat template has no system role and would drop "
        "--system_prompt: write it into the prompts and give --system_prompt '', or give a --chat_template with "
        "that role.",
    )
    prompts: list[Prompt] = []
    shown: Any  # text, or messages
    fit_without = 0
    for i, row in zip(indices, tqdm(rows, desc="prompts", disable=None, leave=False), strict=True):
        try:
            value, more = row.pop(column), options_of(row, config.chat_template_kwargs)
            if as_given and isinstance(value, str):
                shown, ids = text_of(value, column), tokenizer(value)["input_ids"]
                require(len(ids) > 0, f"`{column}` is empty: write a prompt, or leave the row out.")
                lost = next(iter(more), None)
                require(lost is None, f"plain text has no place for `{lost}`: use messages, or drop it.")
            else:
                messages = prompt_of(value, column)
                shown = with_system(messages, system, role)
                ids = render_prompt(tokenizer, shown, more)
                if len(ids) > config.max_prompt_length and shown != messages:
                    fit_without += len(render_prompt(tokenizer, messages, more)) <= config.max_prompt_length
        except ValueError as error:
            raise ValueError(f"row {i + 1} of the data: {error}") from error
        if not as_given:
            row.pop("messages", None)  # may hold the answer
        if len(ids) <= config.max_prompt_length:
            columns = {name: written[i].get(name) if written else value for name, value in row.items()}
            prompts.append(Prompt(shown, ids, columns))
    if not prompts:
        raise ValueError(
            f"all {len(rows)} prompts are longer than max_prompt_length {config.max_prompt_length}: raise it"
            + (f", or give --system_prompt '', with which {fit_without} fit." if fit_without else ".")
        )
    left_out = f"{len(rows) - len(prompts)} longer than {config.max_prompt_length} tokens"
    if fit_without:
        left_out += f" ({fit_without} of them only with the system prompt)"
    if as_given and tokenizer.chat_template is not None and any(isinstance(prompt.messages, str) for prompt in prompts):
        left_out += "; text prompts do not use the chat template: make them lists of messages if they should"
    if role == "user":
        left_out += "; the template has no system role, so the system prompt begins the user's message"
    return prompts, left_out


def prompt_column(rows: Dataset, arguments: GRPOScriptArguments) -> str:
    wanted = arguments.dataset_prompt_column
    for name in [wanted] if wanted else ["prompt", "problem"]:
        if name in rows.column_names:
            return name
    raise ValueError(
        f"{arguments.dataset_name or 'the mixture'} has no column {wanted or '`prompt` or `problem`'} for the prompt; "
        f"it has {', '.join(rows.column_names)}: name one with --dataset_prompt_column."
    )


def sample_seed(seed: int, step: int, group: int) -> int:
    """The seed of a prompt's first sample. The seeds of its other samples are the numbers that follow."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {group}".encode(), digest_size=4).digest()) >> 2


def sample_groups(
    engine: Engine,
    prompts: dict[int, Prompt],
    sampling: Sampling,
    seeds: list[int],
    on_group: Callable[[list[Sample]], None],
) -> list[Sample]:
    """`sampling.n` completions of each prompt (keyed by its group), from the engine's current weights.

    `on_group` is called with each group as soon as it is complete, while others are still being sampled.
    """
    groups = list(prompts)
    samples: dict[int, list[Sample]] = {}

    def finished(index: int, completions: list[Completion]) -> None:
        group = groups[index]
        samples[group] = [
            Sample(group, prompts[group].ids, c.token_ids, c.logps, c.finish_reason, engine.version, index=i)
            for i, c in enumerate(completions)
        ]
        on_group(samples[group])

    engine.sample([prompt.ids for prompt in prompts.values()], sampling, seeds, finished)
    return [sample for group in groups for sample in samples[group]]


class Scorer:
    """Sets the rewards of samples: the pool's worker processes score a group while others are still being sampled.

    scorer = Scorer(...); scorer.begin(group); ...; lines = scorer.finish()
    """

    def __init__(
        self,
        prompts: dict[int, Prompt],
        reward_funcs: list[Callable],
        config: GRPOConfig,
        tokenizer: PreTrainedTokenizerBase,
        pool: WorkerPool,
        trainer_state: SimpleNamespace = BEFORE,
    ) -> None:
        self.prompts, self.reward_funcs, self.weights = prompts, reward_funcs, config.reward_weights
        self.tokenizer, self.pool, self.trainer_state = tokenizer, pool, trainer_state
        self.columns = sorted({name for prompt in prompts.values() for name in prompt.columns})
        self.begun: list[tuple[list[Sample], Callable[[], Scores]]] = []

    def begin(self, samples: list[Sample]) -> None:
        """Start to score `samples`, all of one group or of several."""
        completions = [self.to_score(sample) for sample in samples]
        self.begun.append(
            (samples, start_scoring(self.reward_funcs, self.weights, completions, self.pool, self.trainer_state))
        )

    def to_score(self, sample: Sample) -> ToScore:
        prompt = self.prompts[sample.group]
        return ToScore(
            self.tokenizer.decode(sample.completion_ids, skip_special_tokens=True),
            sample.completion_ids,
            sample.group,
            prompt.messages,
            self.tokenizer.decode(prompt.ids[-16:]),  # the end of the rendered prompt
            {name: prompt.columns.get(name) for name in self.columns},
        )

    def finish(self) -> list[str]:
        """Wait for the rewards and set them. Returns lines to print: what functions printed, one line per function and
        type of error that left completions unscored, and the reasons if no completion has a reward."""
        gaps: list[tuple[str, str]] = []
        rewards: list[float] = []
        for samples, wait in self.begun:
            scores = wait()
            gaps += scores.gaps
            rewards += scores.rewards
            for sample, reward, values in zip(samples, scores.rewards, scores.values, strict=True):
                sample.reward = reward
                sample.rewards = [math.nan if value is None else value for value in values]
        lines = [f"a reward printed: {line}" for line in self.pool.printed()]
        counts = Counter(cause for cause, _ in gaps)
        lines += [f"{counts[c]} completions are unscored: {c}, {text}" for c, text in dict(gaps).items() if text]
        if gaps and all(map(math.isnan, rewards)):
            causes = [f"{cause} {count} times" for cause, count in counts.items()]
            lines.append(f"no completion has a reward: {', '.join(causes)}")
        return lines


@dataclass(frozen=True)
class Summary:
    """The part of a sample that ranks exchange, to compute advantages and the step's metrics."""

    group: int
    length: int
    finish_reason: str
    reward: float
    rewards: list[float]
    advantage: float | None = None  # in training


def gather_summaries(samples: list[Sample]) -> list[Summary]:
    """The summaries of all ranks' samples, in the order of ranks: a few bytes per completion. A collective."""
    gathered: list[list[Summary]] = [[] for _ in range(dist.get_world_size())]
    local = [Summary(s.group, len(s.completion_ids), s.finish_reason, s.reward, s.rewards) for s in samples]
    dist.all_gather_object(gathered, local)
    return [summary for part in gathered for summary in part]


def set_advantages(samples: list[Sample], config: GRPOConfig) -> None:
    """Set every sample's advantage within its group. Ranks exchange the rewards of the whole step, which
    `scale_rewards="batch"` needs. A collective."""
    every, mine = gather_summaries(samples), {sample.group for sample in samples}
    advantages = zip(every, advantages_of(every, config), strict=True)
    own = [advantage for summary, advantage in advantages if summary.group in mine]
    for sample, advantage in zip(samples, own, strict=True):
        sample.advantage = advantage


def advantages_of(samples: Sequence[Sample | Summary], config: GRPOConfig) -> list[float]:
    """The advantages of all samples of a step; 0 for those that are not scored."""
    groups = [sample.group for sample in samples]
    if config.multi_objective_aggregation == "sum_then_normalize":
        return group_advantages([sample.reward for sample in samples], groups, config.scale_rewards).tolist()
    values = [[math.nan if math.isnan(s.reward) else value for value in s.rewards] for s in samples]
    return decoupled_advantages(values, groups, config.reward_weights).tolist()


def check_version(samples: Sequence[Sample], version: int) -> None:
    """Raise RuntimeError unless the policy of `version` sampled all samples."""
    if stale := {sample.version for sample in samples} - {version}:
        raise RuntimeError(
            f"rollouts of policy version {sorted(stale)} cannot train version {version}: use the recording's options."
        )


# Recording and replay: one parquet file per step and rank, with one row per completion.

FORMAT = "2"


def schema(ranks: int) -> pa.Schema:
    import pyarrow as pa  # not needed where no rows are read

    return pa.schema(
        [
            ("group", pa.int64()),
            ("prompt_ids", pa.list_(pa.int64())),
            ("completion_ids", pa.list_(pa.int64())),
            ("sampler_logps", pa.list_(pa.float32())),
            ("finish_reason", pa.string()),
            ("version", pa.int64()),
            ("reward", pa.float64()),
            ("rewards", pa.list_(pa.float64())),
            ("advantage", pa.float64()),
            ("index", pa.int64()),
            ("old_logps", pa.list_(pa.float32())),
            ("ref_logps", pa.list_(pa.float32())),
        ],
        metadata={"ranks": str(ranks), "format": FORMAT},
    )


def write_rollouts(folder: Path, step: int, samples: Sequence[Sample]) -> None:
    """Record this rank's samples of `step` in a file that is written atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(sample) for sample in samples]
    table = pa.Table.from_pylist(rows, schema=schema(dist.get_world_size()))
    path = folder / f"step-{step:06d}-rank-{dist.get_rank():05d}.parquet"
    with whole_file(path) as temporary:
        pq.write_table(table, temporary)


def read_rollouts(folder: Path, step: int) -> list[Sample]:
    """This rank's whole groups of the samples that any number of ranks recorded for `step`.

    Raises:
        ValueError: the step was not recorded, the file of a rank is missing, or another version recorded it.
    """
    import pyarrow.parquet as pq

    files = {file.name: file for file in folder.rglob(f"step-{step:06d}-rank-*.parquet")}
    names = [f"step-{step:06d}-rank-00000.parquet"]
    if names[0] in files:
        # Its metadata has the number of ranks. Files of further ranks, from an earlier recording, are ignored.
        about = pq.read_schema(files[names[0]]).metadata
        require(about.get(b"format") == FORMAT.encode(), f"{files[names[0]]} has another format: record it again.")
        names = [f"step-{step:06d}-rank-{rank:05d}.parquet" for rank in range(int(about[b"ranks"]))]
    if missing := [name for name in names if name not in files]:
        raise ValueError(f"{missing[0]} is not in {folder}: record it with --save_rollouts, or lower max_steps.")
    samples: list[Sample] = []
    for name in names:
        table = pq.read_table(files[name])
        here = [group % dist.get_world_size() == dist.get_rank() for group in table["group"].to_pylist()]
        samples += [Sample(**row) for row in table.filter(here).to_pylist()]
    return sorted(samples, key=lambda sample: (sample.group, sample.index))
