"""A training script in the style of open-r1's: it calls, assigns and reads what such scripts do, in the same order.

torchrun --nproc_per_node 2 tests/open_r1_script.py sft --model_name_or_path M --dataset_name FOLDER ...
"""

import os
import sys
from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from transformers import AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from grpo_core import (
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_callbacks,
    get_kbit_device_map,
    get_peft_config,
    get_quantization_config,
    init_wandb_training,
)
from grpo_core.rewards import accuracy_reward, get_cosine_scaled_reward


@dataclass
class OwnArguments(ScriptArguments):
    rewards: list[str] = field(default_factory=lambda: ["accuracy", "cosine"], metadata={"help": "Which rewards."})
    longest: int = field(default=100, metadata={"help": "Characters at which the cosine ends."})


def main(argv=None):
    kind, *rest = sys.argv[1:] if argv is None else argv
    types = (OwnArguments, GRPOConfig if kind == "grpo" else SFTConfig, ModelConfig)
    script, args, model = TrlParser(types).parse_args_and_config(rest)
    last = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    print(
        args.get_process_log_level(), args.local_rank, args.device, args.n_gpu, args.fp16, args.resume_from_checkpoint
    )
    if "wandb" in args.report_to:
        init_wandb_training(args)
    data = load_dataset(script.dataset_name, name=script.dataset_config)
    precision = model.torch_dtype if model.torch_dtype in ["auto", None] else getattr(torch, model.torch_dtype)
    quantised = get_quantization_config(model)
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": model.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "torch_dtype": precision,
        "use_cache": not args.gradient_checkpointing,
        "device_map": get_kbit_device_map() if quantised is not None else None,
        "quantization_config": quantised,
    }
    common = {"model": model.model_name_or_path, "args": args, "peft_config": get_peft_config(model)}
    if kind == "grpo":
        data = data.map(lambda row: {"prompt": [{"role": "user", "content": row["problem"]}]}).remove_columns(
            "messages"
        )
        known = {"accuracy": accuracy_reward, "cosine": get_cosine_scaled_reward(max_len=script.longest)}
        common["reward_funcs"] = [known[name] for name in script.rewards]
    else:
        tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, use_fast=True)
        tokenizer.pad_token = tokenizer.eos_token
        common["processing_class"] = tokenizer
    trainer = (GRPOTrainer if kind == "grpo" else SFTTrainer)(
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if args.eval_strategy != "no" else None,
        callbacks=get_callbacks(args, model),
        **common,
    )
    metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or last).metrics
    metrics["train_samples"] = len(data[script.dataset_train_split])
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    trainer.save_model(args.output_dir)
    card = {"dataset_name": script.dataset_name, "tags": ["a-tag"]}
    if trainer.accelerator.is_main_process:
        trainer.create_model_card(**card)
        trainer.model.config.use_cache = True
        trainer.model.config.save_pretrained(args.output_dir)
    if args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(data[script.dataset_test_split])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if args.push_to_hub:
        trainer.push_to_hub(**card)


if __name__ == "__main__":
    main()
