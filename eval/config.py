"""Options of eval.run and the data tools: flat dataclasses, parsed like the trainers' (`sft_core/run/cli.py`)."""

from dataclasses import dataclass, field
from typing import ClassVar

from gen.config import TextSampling, check_urls, split_urls
from sft_core.run.options import Options, option, require


@dataclass
class EvalConfig(Options):
    model: str = option("", "Model to score: a Hub id or a folder.", alias="model_name_or_path")
    tasks: str = option("", "Comma-separated tasks: names, LightEval's `custom|math_500|0|0`, or all.", commas=True)
    output_dir: str = option("", "Folder for results and details; the same command resumes there.")
    model_revision: str = option("main", "Branch, tag or commit of a Hub model.")
    dataset: list[str] = option([], "Other data for a task, as task=file or task=Hub id.")
    custom_tasks: str | None = option(None, "Python file with a TASKS_TABLE of custom tasks.")
    num_samples: int = option(1, "Answers sampled per problem; pass@1 is their mean.", ge=1)
    temperature: float = option(0.6, "Sampling temperature; 0 is greedy.", ge=0)
    top_p: float = option(0.95, "Nucleus sampling: the most likely tokens that reach this probability.", gt=0, le=1)
    max_new_tokens: int | None = option(None, "Maximum tokens per answer; default: the task's value (32768).", ge=1)
    fit_context: bool = option(
        False, "Let the context length cut answers off if a prompt and the longest answer exceed it."
    )
    system_prompt: str | None = option(None, "System message before each problem.")
    limit: int | None = option(None, "Use only this many problems of each task, the first ones.", ge=1)
    seed: int = option(0, "Sampling seed.")
    engine: str = option("vllm", "Sampling engine: vllm or torch.")
    base_url: str | None = option(
        None, "OpenAI-compatible servers to sample on instead, as http://host:8000/v1.", commas=True
    )
    dtype: str = option(
        "auto",
        "bfloat16, float16 or float32; auto: bfloat16 on a GPU, else float32.",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    batch_size: int = option(512, "Answers sampled together; bitwise reproduction needs the same value.", ge=1)
    data_parallel_size: int | None = option(
        None, "Copies of the model that sample in parallel; default: all GPUs are used.", ge=1
    )
    tensor_parallel_size: int = option(1, "GPUs that share one copy of the model.", ge=1)
    gpu_memory_utilization: float = option(0.8, "vLLM's share of the GPU's memory.", gt=0)
    check_timeout: float = option(10.0, "Timeout in seconds for checking one answer.", gt=0)
    shard: str | None = option(None, "For internal use: this process does part i/n of the batches.")

    REQUIRED: ClassVar[tuple[str, ...]] = ("model", "tasks", "output_dir")

    def check(self) -> None:
        for name in self.REQUIRED:
            require(getattr(self, name) != "", f"--{name} is missing: give it (see --help).")
        super().check()
        if self.base_url is not None:
            check_urls(split_urls(self.base_url), "--base_url")
        self.sampling(task_tokens=1)  # raises ValueError for bad values

    def sampling(self, task_tokens: int) -> TextSampling:
        """The sampling options of a task; `task_tokens` is the task's own maximum of tokens per answer."""
        longest = task_tokens if self.max_new_tokens is None else self.max_new_tokens
        return TextSampling(self.num_samples, longest, self.temperature, self.top_p, self.seed)


@dataclass
class PassRateConfig(EvalConfig):
    """Options of eval.pass_rate: those of eval.run's sampling, and a data set instead of tasks."""

    dataset_name: str = option("", "Problems to score: a Hub id, a file, or a saved data set.", alias="dataset")
    dataset_config: str | None = option(None, "Configuration of a Hub data set.")
    dataset_split: str = option("train", "Split of the data set.")
    prompt_column: str = option("problem", "Column of the problems.", alias="dataset_prompt_column")
    solution_column: str = option("solution", "Column of the right answers.")
    generations_column: str | None = option(None, "Column of answers to check (a text or a list), instead of a model.")
    num_samples: int = option(4, "Answers sampled per problem.", alias="num_generations", ge=1)
    pass_rate_min: float = option(0.1, "The filtered set has the problems with a pass rate above this.", ge=0)
    pass_rate_max: float = option(0.9, "The filtered set has the problems with a pass rate below this.", le=1)
    output_dataset_name: str | None = option(None, "Hub data set to push to: configurations gen, filt-<min>-<max>.")
    private: bool = option(False, "Create the Hub data set as private.")

    tasks: str = field(default="pass_rate", init=False)
    dataset: list[str] = field(default_factory=list, init=False)
    custom_tasks: str | None = field(default=None, init=False)
    REQUIRED: ClassVar[tuple[str, ...]] = ("dataset_name", "output_dir")

    def check(self) -> None:
        super().check()
        one = bool(self.model) != bool(self.generations_column)
        require(one, "give either --model to sample answers, or --generations_column to check existing ones.")
        low, high = self.pass_rate_min, self.pass_rate_max
        require(low < high, f"pass_rate_min ({low}) must be below pass_rate_max ({high}).")


@dataclass
class DecontaminateConfig(Options):
    dataset: str = option("", "Data set to search: a Hub id, a file, or a saved data set.", alias="dataset_name")
    dataset_config: str | None = option(None, "Configuration of a Hub data set (--config, as in open-r1).")
    split: str = option("train", "Split of the data set.")
    problem_column: str = option("problem", "Column of the problems.")
    ngram_size: int = option(8, "Consecutive words that a row must share with a problem to be flagged.", ge=1)
    tasks: str = option("aime24,aime25,math_500,gpqa:diamond", "Comma-separated evaluation sets, or all.", commas=True)
    eval_dataset: list[str] = option([], "Other data for an evaluation set, as task=file or task=Hub id.")
    custom_tasks: str | None = option(None, "Python file with a TASKS_TABLE of custom tasks.")
    cleanup: bool = option(False, "Remove the flagged rows; else all rows get columns contaminated_<task>.")
    output_dir: str = option("", "Folder for report and rows; the same command resumes there.")
    new_dataset_name: str | None = option(None, "Hub data set to push the rows to.")
    private: bool = option(False, "Create the Hub data set as private.")

    def check(self) -> None:
        for name in ("dataset", "output_dir"):
            require(getattr(self, name) != "", f"--{name} is missing: give it (see --help).")
        super().check()


# The options that samples do not depend on: they may differ when a run resumes.
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
