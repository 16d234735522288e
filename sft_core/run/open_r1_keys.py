"""Keys of open-r1's recipes (and of accelerate's files) that mean nothing here, and what to use instead.

They are accepted with one warning each, so that such a recipe runs unchanged and its user knows; every other unknown
key is refused (`sft_core/run/cli.py`). Left out on purpose: keys that would change the result if they were passed over.
"""

_LAUNCH = "torchrun's flags say how many processes and machines there are"
_SHARDING = "every run is sharded by FSDP2; nothing to set"
_ENGINE = "the engine lives in the ranks themselves; see engine, vllm_gpu_memory_utilization, vllm_tensor_parallel_size"
_PACKED = "micro-batches are packed without padding; max_tokens_per_micro_batch bounds them"
_CODE = "it belongs to code rewards, which are not here; a reward of your own is named module:function"
_QUANTISED = "quantised weights are kept as bitsandbytes makes them, whole on every rank"
_FUSED = "log-probs never make a [tokens, vocabulary] tensor here; nothing to set"

FOREIGN_KEYS: dict[str, str] = {
    "dataset_configs": "use dataset_config (one name)",
    "do_train": "training is what this program does",
    "dataset_num_proc": "rows are tokenised in the trainer's own process",
    "remove_unused_columns": "every column reaches the reward functions",
    "per_device_eval_batch_size": _PACKED,
    "padding_free": _PACKED,
    "packing": _PACKED + "; rows never see each other, and the loss is that of unpacked rows",
    "packing_strategy": "bins are filled by best-fit decreasing with whole rows",
    "shuffle_dataset": "rows are shuffled anew in every pass, by seed",
    "pad_to_multiple_of": _PACKED,
    "gradient_checkpointing_kwargs": "checkpointing here is never reentrant; gradient_checkpointing turns it on",
    "gradient_checkpointing_use_reentrant": "checkpointing here is never reentrant",
    "ignore_bias_buffers": _SHARDING,
    "use_liger": _FUSED,
    "use_liger_kernel": _FUSED,
    "use_liger_loss": _FUSED,
    "wandb_log_unique_prompts": "the completions that are shown are of different prompts as far as there are any",
    "hub_token": "a token has no place in a recipe: set HF_TOKEN or run `hf auth login`",
    "ddp_find_unused_parameters": _SHARDING,
    "ds3_gather_for_generation": _SHARDING,
    "fsdp": _SHARDING,
    "fsdp_config": _SHARDING,
    "deepspeed": _SHARDING,
    "deepspeed_config": _SHARDING,
    "zero3_init_flag": _SHARDING,
    "vllm_device": _ENGINE,
    "vllm_dtype": _ENGINE + "; it computes in the trainer's precision",
    "vllm_max_model_len": _ENGINE + "; its length is max_prompt_length + max_completion_length",
    "vllm_enable_prefix_caching": _ENGINE + "; prefixes are cached and forgotten at every sync",
    "vllm_server_host": _ENGINE,
    "vllm_server_port": _ENGINE,
    "vllm_server_base_url": _ENGINE,
    "vllm_server_timeout": _ENGINE,
    "code_language": _CODE,
    "code_eval_test_batch_size": _CODE,
    "code_eval_scoring_mode": _CODE,
    "parallel_code_exec_per_proc": _CODE,
    "e2b_router_url": _CODE,
    "morph_router_url": _CODE,
    "code_provider": _CODE,
    "ioi_provider": _CODE,
    "vllm_max_model_length": _ENGINE + "; its length is max_prompt_length + max_completion_length",
    "logging_dir": "TensorBoard's files are in output_dir/runs",
    "save_safetensors": "models are always written as safetensors",
    "disable_dropout": "nothing is ever dropped out, but inputs of adapters in SFT (lora_dropout)",
    "log_unique_prompts": "the completions that are shown are of different prompts as far as there are any",
    **dict.fromkeys(
        ("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "disable_tqdm", "tf32",
         "ddp_backend", "log_level_replica", "log_on_each_node", "average_tokens_across_devices", "bf16_full_eval",
         "include_num_input_tokens_seen", "include_tokens_per_second", "eval_packing"), "nothing here needs it",
    ),
    "bnb_4bit_quant_storage": _QUANTISED,
    **dict.fromkeys(
        ("num_processes", "compute_environment", "debug", "distributed_type", "downcast_bf16", "dynamo_config",
         "enable_cpu_affinity", "gpu_ids", "machine_rank", "main_process_ip", "main_process_port",
         "main_training_function", "mixed_precision", "num_machines", "rdzv_backend", "same_network", "tpu_env",
         "tpu_use_cluster", "tpu_use_sudo", "use_cpu"), _LAUNCH,
    ),
}  # fmt: skip
