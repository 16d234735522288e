"""Text sampling: it takes conversations and returns texts, token ids and finish reasons.

    sampler = EngineSampler("vllm", "path/to/model")                    # an engine in this process
    sampler.start(EngineConfig("path/to/model", max_model_len=2048))    # loads the weights
    sampler = ServerSampler(["http://localhost:8000/v1"], "M")          # or OpenAI-compatible servers

    prompts = [sampler.encode(messages) for messages in conversations]
    [[answer, ...], ...] = sampler.sample(prompts, range(len(prompts)), TextSampling(n=4, max_tokens=512))

The model's own chat template renders the prompts.

Not supported, on purpose: log-probs, policy versions, and scoring during sampling. Training, its evaluation and its
audit need these but no text, so they call the engine directly (`grpo_core/rollout.py`). `gen.generate` overlaps its
batches on the servers, so it sends its own requests (`gen/requests.py`).
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
TRIES, AT_ONCE = 5, 256  # attempts per request; requests in flight
TIMEOUT, PATIENCE = 3600.0, 10.0  # seconds per (long) answer; seconds with no usable server


class EngineSampler:
    """A model's tokenizer, stop tokens and context length, and after `start` its engine.

    Raises ValueError if the model cannot be found, before any weights are loaded.
    """

    def __init__(self, engine: str, model: str, revision: str = "main") -> None:
        check_engine_available(engine)
        self.source = source = ModelConfig(model_name_or_path=model, model_revision=revision)
        model_config, self.tokenizer = load_tokenizer(source)
        set_up(self.tokenizer, None, conversations=True, chatml_default=False)  # the end of a turn ends an answer
        self.stop_ids = stop_token_ids(self.tokenizer, source)
        self.positions = getattr(model_config.get_text_config(), "max_position_embeddings", None) or NO_LIMIT
        self.engine_name = engine
        self.engine: Engine | None = None

    def encode(self, messages: Messages) -> list[int]:
        return prompt_ids(self.tokenizer, messages)

    def decode(self, prompt: list[int]) -> str:
        return self.tokenizer.decode(prompt)

    def start(self, config: EngineConfig) -> None:
        if self.source.model_revision != "main":  # engines have no revision option: they get a local copy
            config = replace(config, model_path=local_copy(self.source).model_name_or_path)
        with usage_errors():  # for example, if the weights do not belong to the model
            self.engine = make_engine(self.engine_name, config)

    def sample(
        self, prompts: Sequence[list[int]], positions: Sequence[int], sampling: TextSampling
    ) -> list[list[Answer]]:
        """`sampling.n` answers per prompt. Ranks that share a copy of the model must call together."""
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
    """Servers at `urls` (".../v1") that serve `model`. The tokenizer and the context length are not known here."""

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
        """`sampling.n` answers per prompt. A failed answer is replaced by a text that says why.

        kept: existing answers, by prompt position and sample number.

        Raises ServerError if an earlier call lost all servers, or if none of several prompts is answered.
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
    """Names, sizes and times of a model folder's weight files, to detect changed weights; [] for a Hub id."""
    files = sorted(Path(model).glob("*.safetensors"))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
