"""The one way to sample text: conversations in; texts, token ids and finish reasons out.

    sampler = EngineSampler("vllm", "path/to/model")                    # an engine in this process
    sampler.start(EngineConfig("path/to/model", max_model_len=2048))    # loads the weights
    sampler = ServerSampler(["http://localhost:8000/v1"], "M")          # or OpenAI-compatible servers

    prompts = [sampler.encode(messages) for messages in conversations]
    [[answer, ...], ...] = sampler.sample(prompts, range(len(prompts)), TextSampling(n=4, max_tokens=512))

Prompts are made by the model's own chat template. Left out on purpose: the log-probs of the tokens, their policy
version, and scoring while others are sampled. Training, its evaluation and its audit need these and no text: they take
samples from the engine (`grpo_core/rollout.py`). `gen.generate` has servers answer one batch while another begins, and
so asks them itself (`gen/requests.py`), with the requests that are made here.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gen.client import Answer, Client, RequestError, ServerError, in_parallel
from gen.config import TextSampling
from gen.engine.base import Engine, EngineConfig, Sampling, check_engine_available, make_engine
from sft_core.data.chat_template import set_up
from sft_core.data.conversation import prompt_ids
from sft_core.model.policy import load_tokenizer, local_copy, stop_token_ids
from sft_core.run.config import ModelConfig
from sft_core.run.distributed import usage_errors

Messages = list[dict[str, str]]
NO_LIMIT = 1 << 30  # tokens
TRIES, AT_ONCE = 5, 256  # of a request; requests
TIMEOUT, PATIENCE = 3600.0, 10.0  # seconds: a long answer takes long, a server that is not there does not come soon


class EngineSampler:
    """A model's tokenizer, stop tokens and context, and once `start` was called its engine.

    Raises ValueError for a model that cannot be had, before any weights are loaded.
    """

    def __init__(self, engine: str, model: str, revision: str = "main") -> None:
        check_engine_available(engine)
        self.source = source = ModelConfig(model_name_or_path=model, model_revision=revision)
        model_config, self.tokenizer = load_tokenizer(source)
        set_up(self.tokenizer, None, conversations=True, chatml_default=False)  # what ends a turn ends an answer
        self.stop_ids = stop_token_ids(self.tokenizer, source)
        self.positions = getattr(model_config.get_text_config(), "max_position_embeddings", None) or NO_LIMIT
        self.engine_name = engine
        self.engine: Engine | None = None

    def encode(self, messages: Messages) -> list[int]:
        return prompt_ids(self.tokenizer, messages)

    def decode(self, prompt: list[int]) -> str:
        return self.tokenizer.decode(prompt)

    def start(self, config: EngineConfig) -> None:
        if self.source.model_revision != "main":  # engines know no revisions: they get a copy of its files
            config = replace(config, model_path=local_copy(self.source).model_name_or_path)
        with usage_errors():  # weights that are not the model's
            self.engine = make_engine(self.engine_name, config)

    def sample(
        self, prompts: Sequence[list[int]], positions: Sequence[int], sampling: TextSampling
    ) -> list[list[Answer]]:
        """`sampling.n` answers to each prompt. Ranks that hold a model together call together."""
        assert self.engine is not None, "start it first"
        tokens = Sampling(
            sampling.n,
            sampling.max_tokens,
            sampling.temperature or 1.0,
            self.stop_ids,
            greedy=sampling.temperature == 0,
            top_p=sampling.top_p or 1.0,
        )
        seeds = [sampling.seed_of(position) for position in positions]
        groups = self.engine.sample(list(prompts), tokens, seeds)
        decode = self.tokenizer.decode
        return [
            [
                Answer(
                    text=decode(sample.token_ids, skip_special_tokens=True),
                    tokens=len(sample.token_ids),
                    prompt_tokens=len(prompt),
                    finish_reason=sample.finish_reason,
                    token_ids=sample.token_ids,
                )
                for sample in group
            ]
            for prompt, group in zip(prompts, groups, strict=True)
        ]

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()


class ServerSampler:
    """Servers at `urls` (".../v1") that know `model`; they keep tokenizer and context to themselves."""

    positions = NO_LIMIT

    def __init__(self, urls: list[str], model: str) -> None:
        self.urls, self.model = urls, model
        self.failed: ServerError | None = None

    def encode(self, messages: Messages) -> Messages:
        return messages

    def decode(self, prompt: Messages) -> str:
        return json.dumps(prompt, ensure_ascii=False)

    def sample(
        self,
        prompts: Sequence[Messages],
        positions: Sequence[int],
        sampling: TextSampling,
        kept: dict[tuple[int, int], Answer] | None = None,
    ) -> list[list[Answer | str]]:
        """`sampling.n` answers to each prompt; in place of one that cannot be had a text that says why.

        kept: answers that are there already, by their prompts' positions and their numbers.

        Raises ServerError where an earlier call has met one, and where none of several prompts has an answer.
        """
        if self.failed:
            raise self.failed
        answers: dict[tuple[int, int], Answer | str] = {**(kept or {})}
        missing = [
            (p, prompt, i)
            for p, prompt in zip(positions, prompts, strict=True)
            for i in range(sampling.n)
            if (p, i) not in answers
        ]

        async def ask_all() -> None:
            async with Client(self.urls, timeout=TIMEOUT, retries=TRIES - 1, patience=PATIENCE) as client:

                async def ask(sample: tuple[int, Messages, int]) -> None:
                    p, prompt, i = sample
                    try:
                        answers[p, i] = await client.ask(sampling.request(self.model, prompt, p, i))
                    except RequestError as error:
                        answers[p, i] = str(error)

                await in_parallel(ask, missing, AT_ONCE)

        try:
            asyncio.run(ask_all())
        except ServerError as error:
            self.failed = error
        groups = [[answers.get((p, i), str(self.failed)) for i in range(sampling.n)] for p in positions]
        none = not any(isinstance(answer, Answer) for answer in answers.values())
        if none and (self.failed or len(prompts) > 1):
            raise self.failed or ServerError(groups[0][0])
        return groups

    def close(self) -> None:
        pass


TextSampler = EngineSampler | ServerSampler


def weights_of(model: str) -> list[Any]:
    """Names, sizes and times of a model folder's weights, by which others are noticed; nothing for a Hub id."""
    files = sorted(Path(model).glob("*.safetensors"))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
