"""Generations without a server: an engine in this process, prompts by the model's own chat template.

Batches are sampled one after the other, each drained before the next begins: give a large --input-batch-size. Where a
server's defaults would hold, temperature and top-p are 1. Left out on purpose: models that need several GPUs (serve
them), and generation_config.json beyond its stop tokens.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from gen.client import Answer
from gen.config import GenerateConfig
from gen.engine.base import Engine, Sampling, check_engine_available, make_engine
from gen.store import Batch, Store
from sft_core.data.chat_template import set_up
from sft_core.data.conversation import prompt_ids
from sft_core.model.policy import load_tokenizer, stop_token_ids
from sft_core.run.config import ModelConfig
from sft_core.run.distributed import usage_errors


def weights(config: GenerateConfig) -> list[Any] | None:
    """What tells a model folder's weights from others; a server's are its own affair."""
    if config.engine == "server":
        return None
    files = sorted(Path(config.model).glob("*.safetensors"))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


class Sampler:
    """A model's tokenizer and limits, and once `start` was called its engine. Raises ValueError for bad input."""

    def __init__(self, config: GenerateConfig) -> None:
        check_engine_available(config.engine)
        model = ModelConfig(model_name_or_path=config.model)
        model_config, self.tokenizer = load_tokenizer(model)
        set_up(self.tokenizer, None, conversations=True, chatml_default=False)  # what ends a turn ends an answer
        self.engine: Engine | None = None
        self.config, self.stop_ids = config, stop_token_ids(self.tokenizer, model)
        self.positions = getattr(model_config.get_text_config(), "max_position_embeddings", None) or 1 << 30

    def longest(self, store: Store, indices: Iterable[int]) -> int:
        """Tokens of the longest missing prompt that fits the model's context; 0: there is none.

        Raises ValueError if nothing is done and no prompt fits.
        """
        room, longest, shortest, done = self.positions - self.config.max_new_tokens, 0, 1 << 30, 0
        for index in indices:
            batch = store.batch(index)
            done += len(batch.kept_rows)
            for row in batch.answers:
                length = len(prompt_ids(self.tokenizer, batch.prompts[row]))  # type: ignore[arg-type]
                longest, shortest = max(longest, length if length <= room else 0), min(shortest, length)
        if shortest < 1 << 30 and not longest and not done:
            raise ValueError(
                f"no prompt fits: the shortest has {shortest} tokens, and {self.config.max_new_tokens} new ones leave "
                f"{room} of the model's context of {self.positions}: lower --max-new-tokens."
            )
        return longest

    def start(self, longest: int) -> None:
        cuda = torch.cuda.is_available()
        with usage_errors():  # weights that are not the model's
            self.engine = make_engine(
                self.config.engine,
                self.config.model,
                dtype="bfloat16" if cuda else "float32",
                seed=self.config.seed or 0,
                max_model_len=longest + self.config.max_new_tokens,
                max_batch=min(self.config.at_once, 512),
                gpu_memory_utilization=0.85,
            )

    def answer(self, batch: Batch) -> None:
        """Sample all that is missing of a batch."""
        config = self.config
        n, room = config.num_generations, self.positions - config.max_new_tokens
        ids = {row: prompt_ids(self.tokenizer, batch.prompts[row]) for row in batch.answers}  # type: ignore[arg-type]
        for row, prompt in ids.items():
            if len(prompt) > room:
                batch.failed[row] = f"{len(prompt)} tokens, and only {room} fit before {config.max_new_tokens} new ones"
        rows = [row for row in ids if row not in batch.failed]
        if self.engine is None or not rows:
            return
        sampling = Sampling(
            n,
            config.max_new_tokens,
            config.temperature or 1.0,
            self.stop_ids,
            greedy=config.temperature == 0,
            top_p=1.0 if config.top_p is None else config.top_p,
        )
        seeds = [sample_seed(config, batch.start + row) for row in rows]
        groups = self.engine.sample([ids[row] for row in rows], sampling, seeds)
        for row, group in zip(rows, groups, strict=True):
            for i, found in enumerate(group):
                text = self.tokenizer.decode(found.token_ids, skip_special_tokens=True)
                batch.answers[row][i] = Answer(text, len(found.token_ids), len(ids[row]), found.finish_reason)


def sample_seed(config: GenerateConfig, position: int) -> int:
    """The seed of the first sample of the prompt at `position`; the others count on from it (as in `eval.run`)."""
    return (config.seed or 0) * 1_000_003 + position * config.num_generations
