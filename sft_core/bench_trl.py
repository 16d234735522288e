"""The peer of `sft_core/bench.py`: TRL's SFTTrainer with Liger's kernels, as fast as its options make it.

Padding free, float32 weights under bf16 autocast (its way to float32 masters), fused AdamW, and for attention torch's
varlen kernel as this trainer has it, since flash-attn, which TRL would use, is often not installed. Timed from
on_step_begin to on_step_end: the collation of its batch is not in it. Written for TRL 1.16.
"""

import tempfile
from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM
from trl import SFTConfig as TRLConfig
from trl import SFTTrainer

from kernels.attention import packed_attention, packed_layout
from sft_core.bench import WARM_UP, Case, Clock, Phases, documents


class InOrder(SFTTrainer):
    """Rows as they come, so that each step has the documents that this project's trainer has."""

    def _get_train_sampler(self, *arguments: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Callback(transformers.TrainerCallback):
    def __init__(self, device: torch.device) -> None:
        self.device, self.steps = device, list[Phases]()

    def on_step_begin(self, *arguments: Any, **more: Any) -> None:
        self.clock = Clock(self.device)

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        self.clock("step")
        self.steps.append(self.clock.phases)


def trl(case: Case) -> list[Phases]:
    config, device, total = case.config, case.device, WARM_UP + case.steps
    rows = [ids for i in range(total) for ids in documents(case.tokens, case.info.vocab_size, seed=1 + i)]
    words = models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="<eos>")
    transformers.AttentionInterface.register("by_lengths", attention_by_lengths)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(case.info, attn_implementation="by_lengths", dtype=torch.float32)
    clock, on_gpu = Callback(device), device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        arguments = TRLConfig(
            output_dir=folder,
            max_steps=total,
            per_device_train_batch_size=len(rows) // total,
            padding_free=True,
            max_length=None,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            use_liger_kernel=on_gpu,
            optim="adamw_torch_fused",
            gradient_checkpointing=config.gradient_checkpointing,
            max_grad_norm=config.max_grad_norm,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        InOrder(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[clock]).train()
    return clock.steps[WARM_UP:]


def attention_by_lengths(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> Any:
    """Packed attention where TRL gives the documents' cumulative lengths; one layout a batch."""
    cu_seqlens = options["cu_seq_lens_q"]
    if _layout[0] is not cu_seqlens:
        _layout[:] = cu_seqlens, packed_layout(cu_seqlens.diff().tolist(), query.device)
    if torch.is_autocast_enabled(query.device.type):  # the rotation has left query and key in float32
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    return packed_attention(module, query, key, value, mask, packed=_layout[1], scaling=options["scaling"])


_layout: list[Any] = [None, None]  # the last cu_seq_lens_q and what they say
