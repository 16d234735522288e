"""Loads models and tokenizers, and defines the policy: a transformers model that scores packed sequences.

Not supported, on purpose: models whose logits are not just `hidden @ head.T` (bias, soft-cap, scale). They are refused,
because log-probs are computed directly from hidden states (`kernels/linear_logprob.py`).
"""

import copy
import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

import kernels.attention
from kernels.linear_logprob import linear_logprob
from kernels.linear_loss import TokenLoss, linear_loss
from sft_core.data.packing import PackedSequences, pack_sequences
from sft_core.model.adapters import add_adapters, is_tied, quantization
from sft_core.model.weight_files import can_read_slices, weight_files
from sft_core.run.config import ModelConfig, TrainingConfig
from sft_core.run.options import require

kernels.attention.register()
# `load_whole` reports the causes of its warnings in one sentence.
logging.getLogger("transformers.modeling_utils").addFilter(lambda record: record.levelno > logging.WARNING)
logger = logging.getLogger(__name__)
ADAPTER_FOLDER = "{} holds an adapter, not a model: train it with --merge_adapter true and give its folder `merged`."


class Policy(nn.Module):
    """A causal language model that computes the log-probs of given tokens without ever making a [T, V] tensor.

    Raises:
        ValueError: the model has no list of blocks, or its head is not a single matrix.
    """

    def __init__(self, model: Any, files: dict[str, Path] | None = None) -> None:
        """`files`: for a model on the meta device, the files from which `parallel.shard` reads its weights."""
        super().__init__()
        kind, head = type(model).__name__, model.get_output_embeddings()
        require(
            isinstance(getattr(model.get_decoder(), "layers", None), nn.ModuleList),
            f"{kind} has no list of blocks at get_decoder().layers",
        )
        require(
            getattr(head, "bias", None) is None and hasattr(head, "weight"),
            f"the head of {kind} is not a single matrix without a bias",
        )
        self.model = model
        self.tied = is_tied(model)
        self.files = files

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.get_decoder().layers

    def forward(
        self,
        batch: PackedSequences,
        temperature: float = 1.0,
        token_loss: TokenLoss | None = None,
        active: Tensor | None = None,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, ...]:
        """Log-probs of the scored tokens, entropies, and log-probs of the likeliest tokens: [N] each, float32, of
        softmax(logits / temperature).

        With `token_loss`, the sum of its losses [] comes first, and only this sum has a gradient. It is cheaper than a
        loss computed from the log-probs. `active` and `entropy_gradient` are passed to `kernels.linear_loss`.
        """
        hidden = self.model.get_decoder()(
            input_ids=batch.input_ids,
            position_ids=batch.layout.position_ids[None],
            use_cache=False,
            packed=batch.layout,
        ).last_hidden_state[0]  # [T, D]
        # With adapters, peft may train a copy of the embedding, which must also serve as the tied head.
        head = self.model.get_input_embeddings() if self.tied else self.model.get_output_embeddings()
        scored = hidden.index_select(0, batch.rows)  # its backward need not sort, unlike that of hidden[rows]
        if token_loss is None:
            return linear_logprob(scored, head.weight, batch.targets, temperature=temperature)
        return linear_loss(
            scored,
            head.weight,
            batch.targets,
            token_loss,
            entropy_gradient=entropy_gradient,
            temperature=temperature,
            active=active,
        )

    @torch.no_grad()
    def score(
        self,
        prompt: list[int],
        completions: list[list[int]],
        temperature: float,
        device: torch.device,
        share_prompt: bool = False,
    ) -> Tensor:
        """Log-probs [N] of the tokens of all `completions` in order, each scored after the prompt. With `share_prompt`
        the prompt is computed once. A collective, like every pass."""
        sequences = [prompt + completion for completion in completions]
        masks = [[False] * len(prompt) + [True] * len(completion) for completion in completions]
        shared = [len(prompt) * share_prompt * (i > 0) for i in range(len(completions))]
        return self(pack_sequences(sequences, masks, device, shared), temperature)[0]


def check_positions(config: PretrainedConfig, tokens: int, what: str, remedy: str) -> None:
    """Raise ValueError if `tokens`, which `what` may take, exceed the model's positions, or the length at which its
    rotary embedding changes its factors: the longest sequence would change them for the whole packed row.

    `remedy` may contain {limit}.
    """
    text = config.get_text_config()
    limits = {getattr(text, "max_position_embeddings", None): "the model has {limit} positions"}
    rope = getattr(text, "rope_parameters", None) or {}
    for entry in (rope, *rope.values()):  # some models have one entry per type of layer
        if isinstance(entry, dict) and entry.get("rope_type") == "longrope":
            limits[entry["original_max_position_embeddings"]] = "the model's longrope changes its factors after {limit}"
    for limit, says in limits.items():
        if limit is not None and tokens > limit:
            raise ValueError(f"{what} may take {tokens} tokens, but {says}: {remedy}.".format(limit=limit))


def load_model_info(config: ModelConfig) -> PretrainedConfig:
    """The model's configuration. A local folder needs only its config.json for this.

    Raises:
        ValueError: the model does not exist, or its kind is not supported.
    """
    model_config = _from_files(AutoConfig, config)
    for attribute in ("attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model_config.get_text_config(), attribute, None) not in (None, 1.0):
            raise ValueError(
                f"{config.model_name_or_path} caps or scales its scores or logits ({attribute}), which is not "
                "supported: choose another model."
            )
    return model_config


def _from_files(kind: Any, config: ModelConfig, given_as: str = "model_name_or_path") -> Any:
    """`kind`.from_pretrained of the model's folder or Hub id."""
    name = config.model_name_or_path
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).is_dir():
        raise ValueError(f"there is no model folder at {name}: check --{given_as}.")
    require(not (Path(name) / "adapter_config.json").is_file(), ADAPTER_FOLDER.format(name))
    try:
        return kind.from_pretrained(name, revision=config.model_revision, trust_remote_code=config.trust_remote_code)
    except OSError as error:
        raise ValueError(
            f"cannot load model {name!r}, which is neither a model folder nor a Hub id that can be reached from here: "
            f"check --{given_as}. Cause: {str(error).splitlines()[0]}"
        ) from error


def load_tokenizer(
    config: ModelConfig, chat_template: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """The model's configuration and its tokenizer, or a copy of the `tokenizer` passed in; no weights are loaded.

    `chat_template` replaces the tokenizer's template: Jinja text, a file with it, or a model whose tokenizer has it.
    From such a model's tokenizer the added tokens, which its template writes, and the EOS are also copied, as in
    TRL's `clone_chat_template`; the embedding grows as for ChatML.

    Raises:
        ValueError: the model does not exist, or its kind is not supported.
    """
    model_config = load_model_info(config)
    tokenizer = _from_files(AutoTokenizer, config) if tokenizer is None else copy.deepcopy(tokenizer)
    if chat_template is not None:
        text = chat_template
        if len(text) < 1000 and "{" not in text:  # not Jinja text, which has braces
            file = Path(text)
            if file.is_dir() or (text.count("/") == 1 and file.suffix not in (".jinja", ".j2") and not file.is_file()):
                source = dataclasses.replace(config, model_name_or_path=text, model_revision="main")
                other = _from_files(AutoTokenizer, source, "chat_template")
                require(isinstance(other.chat_template, str), f"{text} has no chat template: check --chat_template.")
                tokenizer.add_tokens([token for _, token in sorted(other.added_tokens_decoder.items())])
                tokenizer.eos_token = other.eos_token or tokenizer.eos_token
                text = other.chat_template
            else:
                require(
                    file.is_file(),
                    f"chat_template {text!r} is neither Jinja text nor a file nor a model: check --chat_template.",
                )
                text = file.read_text(encoding="utf-8")
        require(text.strip() != "", f"the chat template {chat_template} is empty: check --chat_template.")
        tokenizer.chat_template = text
    return model_config, tokenizer


def architecture(config: PretrainedConfig) -> str:
    """A short digest of a model's configuration, without the fields that do not affect its weights."""
    ignored = {"transformers_version", "_name_or_path", "dtype", "use_cache"}
    described = {key: value for key, value in config.to_dict().items() if key not in ignored}
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]


def count_parameters(config: PretrainedConfig, trust_remote_code: bool = False) -> int:
    """The number of parameters of the model that `config` describes; no weights are allocated."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).num_parameters()


def local_copy(config: ModelConfig) -> ModelConfig:
    """The same model as a local folder, so that policy, reference model and engine read the same files."""
    if Path(config.model_name_or_path).is_dir():
        return config
    files = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", *(["*.py"] if config.trust_remote_code else [])]
    folder = snapshot_download(config.model_name_or_path, revision=config.model_revision, allow_patterns=files)
    return dataclasses.replace(config, model_name_or_path=folder)


def load_whole(name: str, **options: Any) -> Any:
    """The model of a folder or Hub id. Its files must hold all weights: transformers would initialise missing ones.

    Weights outside the model, such as a value head, are ignored with a warning.

    Raises:
        ValueError: a weight is missing or has a wrong shape, a weight inside the model's body is unexpected, or a file
            cannot be read.
    """
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError, UnpicklingError) as error:
        raise ValueError(
            f"the weights of {name} cannot be loaded: check that its files are complete, or download them again. "
            f"Cause: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    require(not getattr(model, "_hf_peft_config_loaded", False), ADAPTER_FOLDER.format(name))
    missing, unexpected = found["missing_keys"], found["unexpected_keys"]
    shapes = {f"{key} {list(there)} for {list(here)}" for key, there, here in found["mismatched_keys"]}
    tied = model.config.tie_word_embeddings and model.device.type != "meta"
    apart = {"embedding and head"} if tied and not is_tied(model) else set()  # other programs would tie them
    kinds = {
        "missing": missing,
        "of another shape": shapes,
        "not in the model": unexpected,
        "tied but not equal": apart,
    }
    says = "; ".join(
        f"{kind}: {', '.join(sorted(keys)[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for kind, keys in kinds.items()
        if keys
    )
    inside = any(key.startswith(f"{model.base_model_prefix}.") for key in unexpected)
    require(
        not (missing or shapes or apart or inside),
        f"the weights of {name} do not fit its config.json ({says}): give the config.json that belongs to them.",
    )
    if says:
        logger.warning("some weights of %s are ignored, %s", name, says)
    return model


def load_policy(
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    known_as: str = "",
    vocab_size: int = 0,
    to_shard: bool = False,
) -> Policy:
    """The policy on the CPU, in the dtype of its files; `sft_core.model.parallel.shard` turns it into float32 shards.

    With adapters the model is frozen, in the compute dtype `dtype`, or quantised (then on the rank's device); `seed`
    and `known_as` are passed to `sft_core.model.adapters.add_adapters`.

    `vocab_size`: the embedding grows to at least this; new tokens start as the mean of the others.
    `to_shard`: leave the weights in their files if `shard` can read them from there.

    The policy stays in eval mode: with dropout the trained policy would differ from the sampled one. Only the adapters'
    dropout is turned on in SFT's training passes (`sft_core.model.adapters.dropout`).
    """
    quantised, name = quantization(config, dtype), config.model_name_or_path
    options: dict[str, Any] = {
        "revision": config.model_revision,
        "trust_remote_code": config.trust_remote_code,
        "dtype": dtype if config.use_peft else "auto",
        "attn_implementation": "packed",
    }
    if to_shard and not config.use_peft and can_read_slices(name):
        model = load_whole(name, device_map="meta", **options).eval()
        files = weight_files(model, name)
        if files and vocab_size <= model.get_input_embeddings().num_embeddings:
            return Policy(model, files)
    if quantised:
        options["quantization_config"] = quantised
    model = load_whole(name, **options).eval()
    known = model.get_input_embeddings().num_embeddings
    if vocab_size > known:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
        for end in (model.get_input_embeddings(), model.get_output_embeddings()):
            end.weight.data[known:] = end.weight.data[:known].float().mean(0).to(end.weight.dtype)
    return Policy(add_adapters(model, config, seed, known_as) if config.use_peft else model)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> frozenset[int]:
    """All tokens that end a completion: the tokenizer's EOS and those of the model's generation_config.json."""
    ids = {tokenizer.eos_token_id}
    try:
        declared = GenerationConfig.from_pretrained(
            config.model_name_or_path, revision=config.model_revision
        ).eos_token_id
    except OSError:  # the file is optional
        declared = None
    ids |= set(declared if isinstance(declared, list) else [declared])
    ids.discard(None)
    if not ids:
        raise ValueError(f"{config.model_name_or_path} has no EOS token: set eos_token in its tokenizer_config.json.")
    return frozenset(ids)


def compute_in_bf16(bf16: bool | None, dtype: str | None, device: torch.device) -> bool:
    """Whether to compute in bfloat16: `bf16` decides, else the model's `dtype`, else whether CUDA supports it.

    Raises:
        ValueError: the options ask for bfloat16 on a GPU without it.
    """
    if bf16 is None and dtype in ("bfloat16", "float32"):
        bf16 = dtype == "bfloat16"
    if bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError("this GPU has no bfloat16: use --bf16 false (float32).")
    return device.type == "cuda" and torch.cuda.is_bf16_supported() if bf16 is None else bf16


def planned_dtype(model: ModelConfig, config: TrainingConfig) -> torch.dtype:
    """The compute dtype on a GPU, for a plan made without one."""
    bf16 = model.dtype != "float32" if config.bf16 is None else config.bf16
    return torch.bfloat16 if bf16 else torch.float32
