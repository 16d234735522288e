"""Options of eval.run and the data tools: flat dataclasses, read like the trainers' (`sft_core/run/cli.py`)."""

from dataclasses import dataclass, field
from typing import ClassVar

from gen.config import TextSampling, check_urls, split_urls
from sft_core.run.options import Options, option, require


@dataclass
class EvalConfig(Options):
    model: str = option("", "Model to score: a Hub id or a folder.", alias="model_name_or_path")
    tasks: str = option(
        "", "Tasks, with commas between: names, LightEval's `custom|math_500|0|0`, or all.", commas=True
    )
    output_dir: str = option("", "Folder for results and details; the same command again goes on there.")
    model_revision: str = option("main", "Branch, tag or commit of a Hub model.")
    dataset: list[str] = option([], "Data of a task from elsewhere, as task=file or task=Hub id.")
    custom_tasks: str | None = option(None, "Python file with a TASKS_TABLE of your own tasks.")
    num_samples: int = option(1, "Answers sampled to each problem; pass@1 is their mean.", ge=1)
    temperature: float = option(0.6, "Sampling temperature; 0 takes the most likely token.", ge=0)
    top_p: float = option(0.95, "Sample from the most likely tokens that reach this probability together.", gt=0, le=1)
    max_new_tokens: int | None = option(None, "Longest answer in tokens; without it what the task says (32768).", ge=1)
    fit_context: bool = option(
        False, "Let answers end where the context does, if a prompt and the longest answer exceed it."
    )
    system_prompt: str | None = option(None, "System message before each problem.")
    limit: int | None = option(None, "Only the first so many problems of each task.", ge=1)
    seed: int = option(0, "Seed of the sampling.")
    engine: str = option("vllm", "What samples: vllm or torch.")
    base_url: str | None = option(
        None, "OpenAI-compatible server that samples instead, as http://host:8000/v1.", commas=True
    )
    dtype: str = option(
        "auto",
        "bfloat16, float16 or float32; auto: bfloat16 on a GPU, else float32.",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    batch_size: int = option(512, "Answers sampled together; part of what makes a run repeat exactly.", ge=1)
    data_parallel_size: int | None = option(
        None, "Copies of the model side by side; without it, all GPUs are used.", ge=1
    )
    tensor_parallel_size: int = option(1, "GPUs that share one copy of the model.", ge=1)
    gpu_memory_utilization: float = option(0.8, "vLLM's share of the GPU's memory.", gt=0)
    check_timeout: float = option(10.0, "Seconds that checking one answer may take.", gt=0)
    shard: str | None = option(None, "For internal use: the part i/n of the batches that this process does.")

    REQUIRED: ClassVar[tuple[str, ...]] = ("model", "tasks", "output_dir")

    def check(self) -> None:
        for name in self.REQUIRED:
            require(getattr(self, name) != "", f"--{name} is required.")
        super().check()
        if self.base_url is not None:
            check_urls(split_urls(self.base_url), "--base_url")
        self.sampling(task_tokens=1)  # its values are checked when it is made

    def sampling(self, task_tokens: int) -> TextSampling:
        """`task_tokens`: longest answer as the task says."""
        longest = task_tokens if self.max_new_tokens is None else self.max_new_tokens
        return TextSampling(self.num_samples, longest, self.temperature, self.top_p, self.seed)


@dataclass
class PassRateConfig(EvalConfig):
    """Of eval.pass_rate: the sampling is eval.run's, with a data set for the task."""

    dataset_name: str = option("", "Problems to score: a Hub id, a file, or a saved data set.", alias="dataset")
    dataset_config: str | None = option(None, "Configuration of a Hub data set.")
    dataset_split: str = option("train", "Its split.")
    prompt_column: str = option("problem", "Column of the problems.", alias="dataset_prompt_column")
    solution_column: str = option("solution", "Column of the right answers.")
    generations_column: str | None = option(None, "Column of answers to check (a text or a list), instead of a model.")
    num_samples: int = option(4, "Answers sampled to each problem.", alias="num_generations", ge=1)
    pass_rate_min: float = option(0.1, "The filtered set has the problems solved more often than this ...", ge=0)
    pass_rate_max: float = option(0.9, "... and less often than this.", le=1)
    output_dataset_name: str | None = option(None, "Hub data set to push to: configurations gen, filt-<min>-<max>.")
    private: bool = option(False, "Push to a private one.")

    tasks: str = field(default="pass_rate", init=False)
    dataset: list[str] = field(default_factory=list, init=False)
    custom_tasks: str | None = field(default=None, init=False)
    REQUIRED: ClassVar[tuple[str, ...]] = ("dataset_name", "output_dir")

    def check(self) -> None:
        super().check()
        one = bool(self.model) != bool(self.generations_column)
        require(one, "give either --model to sample answers, or --generations_column to check those that are there.")
        low, high = self.pass_rate_min, self.pass_rate_max
        require(low < high, f"pass_rate_min ({low}) must be below pass_rate_max ({high}).")


@dataclass
class DecontaminateConfig(Options):
    dataset: str = option("", "Data set to search: a Hub id, a file, or a saved data set.", alias="dataset_name")
    dataset_config: str | None = option(None, "Configuration of a Hub data set (--config, as in open-r1).")
    split: str = option("train", "Its split.")
    problem_column: str = option("problem", "Column of the problems.")
    ngram_size: int = option(8, "Words that a row must share with a problem, one after another.", ge=1)
    tasks: str = option(
        "aime24,aime25,math_500,gpqa:diamond", "Evaluation sets, with commas between, or all.", commas=True
    )
    eval_dataset: list[str] = option([], "Rows of an evaluation set from elsewhere, as task=file or task=Hub id.")
    custom_tasks: str | None = option(None, "Python file with a TASKS_TABLE of your own tasks.")
    cleanup: bool = option(False, "Leave the flagged rows out; else they get columns contaminated_<task>.")
    output_dir: str = option("", "Folder for report and rows; the same command again goes on there.")
    new_dataset_name: str | None = option(None, "Hub data set to push the rows to.")
    private: bool = option(False, "Push to a private one.")

    def check(self) -> None:
        for name in ("dataset", "output_dir"):
            require(getattr(self, name) != "", f"--{name} is required.")
        super().check()


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
    "check_timeout",
    "pass_rate_min",
    "pass_rate_max",
    "output_dataset_name",
    "private",
)
