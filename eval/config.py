"""What an evaluation can be told: one flat frozen dataclass, read like the trainers' (`sft_core/cli.py`)."""

from dataclasses import dataclass

from sft_core.config import option, require


@dataclass(frozen=True)
class EvalConfig:
    model: str = option("", "Model to score: a Hub id or a folder.", alias="model_name_or_path")
    tasks: str = option("", "Tasks, with commas between: names, LightEval's `custom|math_500|0|0`, or all.")
    output_dir: str = option("", "Folder for results and details; the same command again goes on there.")
    model_revision: str = option("main", "Branch, tag or commit of a Hub model.")
    dataset: list[str] = option([], "Data of a task from elsewhere, as task=file or task=Hub id.")
    custom_tasks: str | None = option(None, "Python file with a TASKS_TABLE of your own tasks.")
    num_samples: int = option(1, "Answers sampled to each problem; pass@1 is their mean.")
    temperature: float = option(0.6, "Sampling temperature; 0 takes the most likely token.")
    top_p: float = option(0.95, "Sample from the most likely tokens that reach this probability together.")
    max_new_tokens: int | None = option(None, "Longest answer in tokens; without it what the task says (32768).")
    fit_context: bool = option(False, "Where a prompt and the longest answer exceed the context, cut answers shorter.")
    system_prompt: str | None = option(None, "System message before each problem.")
    limit: int | None = option(None, "Only the first so many problems of each task.")
    seed: int = option(0, "Seed of the sampling.")
    engine: str = option("vllm", "What samples: vllm or torch.")
    base_url: str | None = option(None, "OpenAI-compatible server that samples instead, as http://host:8000/v1.")
    dtype: str = option("auto", "bfloat16, float16 or float32; auto: bfloat16 on a GPU, else float32.")
    batch_size: int = option(512, "Answers sampled together; part of what makes a run repeat exactly.")
    data_parallel_size: int | None = option(None, "Copies of the model side by side; without it, all GPUs are used.")
    tensor_parallel_size: int = option(1, "GPUs that share one copy of the model.")
    gpu_memory_utilization: float = option(0.8, "vLLM's share of the GPU's memory.")
    check_timeout: float = option(10.0, "Seconds that checking one answer may take.")
    shard: str | None = option(None, "For internal use: the part i/n of the batches that this process does.")

    def __post_init__(self) -> None:
        for name in ("model", "tasks", "output_dir"):
            require(getattr(self, name) != "", f"--{name} is required.")
        for name in ("num_samples", "batch_size", "tensor_parallel_size", "max_new_tokens", "limit"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}.")
        require(self.temperature >= 0, f"temperature must be at least 0, got {self.temperature}.")
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}.")
        greedy = self.temperature > 0 or self.num_samples == 1
        require(greedy, "temperature 0 gives the same answer every time: use --num_samples 1 or a temperature above 0.")


# What a sample does not depend on: may differ when a run is continued.
NOT_IDENTITY = (
    "tasks",
    "output_dir",
    "dataset",
    "custom_tasks",
    "fit_context",
    "data_parallel_size",
    "shard",
    "base_url",
)
