"""The plain torch engine: a transformers model, a KV cache and a sampling loop, in about a hundred lines.

It is the reference implementation for gen/engine/vllm.py, and slow. In float32 it agrees with the training forward pass
up to rounding, on the CPU it is bitwise reproducible, and it needs only transformers. Three things make it faster: each
prompt is computed once and its n samples share its KV cache, finished rows leave the batch, and sampling is vectorised.

Each sample has its own random numbers: sample i of a prompt draws all its uniforms from a generator seeded with
`seed + i`, and the inverse CDF maps the t-th uniform to token t. So the draws of a sample do not depend on the batch
that it is in or on its place there.

Not supported, on purpose: paging, continuous batching, tensor parallelism.

    engine = TorchEngine("path/to/model", dtype=torch.float32, max_model_len=512)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from gen.engine.base import ASLEEP, INITIAL_VERSION, Completion, Loaded, Sampling, Synced, check_request
from gen.engine.weight_sync import Checksums
from sft_core.model.export import named_tensors
from sft_core.model.policy import load_whole


def uniforms(seed: int, count: int) -> Tensor:
    """The float64 uniforms in [0, 1) of the sample with this seed, one per token: [count]."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def choose_tokens(
    logits: Tensor, draws: Tensor | None, temperature: float, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Tokens [B] and their log-probs [B] from float32 logits [B, V] and uniforms `draws` [B] (None: greedy)."""
    if draws is None:
        logps = torch.log_softmax(logits, dim=-1)
        tokens = logits.argmax(dim=-1)
    else:
        logps = torch.log_softmax(logits / temperature, dim=-1)
        if top_p < 1:
            probs, order = logps.double().exp().sort(dim=-1, descending=True)
            beyond = probs.cumsum(dim=-1) - probs >= top_p  # the more likely tokens already reach top_p
            logps = logps.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), float("-inf"))
            logps = torch.log_softmax(logps, dim=-1)
        cdf = logps.double().exp().cumsum(dim=-1)  # float64: a float32 sum over a large vocabulary loses rare tokens
        # right=True finds the first entry above the draw, so a token with probability zero is never chosen.
        tokens = torch.searchsorted(cdf, (draws * cdf[:, -1]).unsqueeze(1), right=True).squeeze(1)
        tokens = tokens.clamp_(max=logits.shape[-1] - 1)
    return tokens, logps.gather(1, tokens.unsqueeze(1)).squeeze(1)


class TorchEngine:
    """`Engine` in plain torch; see the module docstring. `model` may be a folder, a Hub id or a loaded model."""

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        dtype: torch.dtype = torch.float32,
        max_model_len: int,
        max_batch: int = 256,
        device: torch.device | str | None = None,
    ):
        if isinstance(model, str):
            model = load_whole(model, dtype=dtype, attn_implementation="sdpa")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.max_model_len = max_model_len
        self.max_batch = max_batch
        self.version = INITIAL_VERSION
        self.synced: Synced | None = None
        self.asleep: dict[str, torch.Size] = {}  # shapes of the weights that `sleep` has freed

    def sample(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seeds: list[int],
        finished: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """See `gen.engine.base.Engine.sample`."""
        if self.asleep:
            raise RuntimeError(ASLEEP)
        check_request(prompts, seeds, self.max_model_len)
        n = sampling.n
        rows = [(p, i) for p in range(len(prompts)) for i in range(n)]
        completions: list[list[Completion]] = [[] for _ in prompts]
        for start in range(0, len(rows), self.max_batch):
            batch = rows[start : start + self.max_batch]
            draws = [] if sampling.greedy else [uniforms(seeds[p] + i, sampling.max_tokens) for p, i in batch]
            done = self._run_batch(prompts, [p for p, _ in batch], torch.stack(draws) if draws else None, sampling)
            for (p, _), completion in zip(batch, done, strict=True):
                completions[p].append(completion)
                if finished is not None and len(completions[p]) == n:
                    finished(p, completions[p])
        return completions

    @torch.inference_mode()
    def _run_batch(
        self,
        prompts: list[list[int]],
        prompt_of_row: list[int],
        draws: Tensor | None,  # [B, max_tokens]
        sampling: Sampling,
    ) -> list[Completion]:
        """Sample B completions; row b continues prompts[prompt_of_row[b]]."""
        used = sorted(set(prompt_of_row))
        width = max(len(prompts[p]) for p in used)
        ids = torch.zeros(len(used), width, dtype=torch.long)
        mask = torch.zeros(len(used), width, dtype=torch.long)
        for row, p in enumerate(used):  # left padding: the last column holds the last token of every prompt
            ids[row, width - len(prompts[p]) :] = torch.tensor(prompts[p])
            mask[row, width - len(prompts[p]) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        draws = None if draws is None else draws.to(self.device)
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)

        cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, mask, positions, cache)
        expand = torch.tensor([used.index(p) for p in prompt_of_row], device=self.device)
        cache.batch_select_indices(expand)
        logits, mask, position = logits[expand], mask[expand], positions[expand, -1:]

        room = self.max_model_len - mask.sum(-1)  # [B] tokens left in the context
        tokens_of: list[list[int]] = [[] for _ in prompt_of_row]
        logps_of: list[list[float]] = [[] for _ in prompt_of_row]
        stopped = [False] * len(prompt_of_row)
        alive = torch.arange(len(prompt_of_row), device=self.device)  # rows still in the batch
        stop = torch.tensor(sorted(sampling.stop_ids), dtype=torch.long, device=self.device)
        for t in range(sampling.max_tokens):
            drawn = None if draws is None else draws[alive, t]
            tokens, logps = choose_tokens(logits, drawn, sampling.temperature, sampling.top_p)
            ended = torch.isin(tokens, stop)
            for row, token, logp, end in zip(
                alive.tolist(), tokens.tolist(), logps.tolist(), ended.tolist(), strict=True
            ):
                tokens_of[row].append(token)
                logps_of[row].append(logp)
                stopped[row] = end
            ended |= room[alive] == t + 1
            if t + 1 == sampling.max_tokens or bool(ended.all()):
                break
            if bool(ended.any()):
                keep = (~ended).nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                alive, tokens, mask, position = alive[keep], tokens[keep], mask[keep], position[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            position = position + 1
            logits = self._forward(tokens.unsqueeze(1), mask, position, cache)
        return [
            Completion(ids, logps, "stop" if end else "length")
            for ids, logps, end in zip(tokens_of, logps_of, stopped, strict=True)
        ]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [B, V] float32 after the last column of ids [B, T]; mask [B, past + T]; grows the cache."""
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float()

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Loaded:
        """See `gen.engine.base.Engine.load_weights`. Raises RuntimeError also for unknown names and wrong shapes."""
        self.version = INITIAL_VERSION
        parameters = dict(named_tensors(self.model))  # includes persistent buffers; tied weights appear once
        for name, shape in self.asleep.items():
            parameters[name].data = parameters[name].new_full(shape, float("nan"))
        self.asleep = {}
        held = Checksums()
        for name, tensor in weights:
            if name not in parameters:
                raise RuntimeError(f"the engine has no parameter {name!r}: start it from the policy's own model")
            if tensor.shape != parameters[name].shape:
                raise RuntimeError(
                    f"{name} has shape {tuple(tensor.shape)}, but {tuple(parameters[name].shape)} in the engine's "
                    "model: start it from the policy's own model"
                )
            parameters[name].copy_(tensor)
            held.add(name, parameters[name].to(tensor.dtype))  # some models keep some parameters in float32
        loaded = Loaded(held.kinds, dict.fromkeys(parameters) | held.read(), as_sent=True)
        self.version = version
        return loaded

    def sleep(self) -> None:
        """See `gen.engine.base.Engine.sleep`."""
        self.version = INITIAL_VERSION
        for name, parameter in self.model.named_parameters() if not self.asleep else ():
            self.asleep[name] = parameter.shape
            parameter.data = parameter.new_empty(0)

    def close(self) -> None:
        """Delete the model."""
        del self.model
