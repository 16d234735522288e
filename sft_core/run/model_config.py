"""The options for model and data, which both trainers share. Import them from `config.py`."""

from dataclasses import dataclass
from typing import Literal

from sft_core.run.options import JsonDict, Options, option, require


@dataclass
class ModelConfig(Options):
    model_name_or_path: str = option("", "Model to start from: a Hub id or a folder.")
    model_revision: str = option("main", "Branch, tag or commit of a Hub model.")
    dtype: str | None = option(
        None,
        "Compute dtype if bf16 is not given: bfloat16, float32 or auto; masters are always float32.",
        alias="torch_dtype",
        choices=("auto", "bfloat16", "float32"),
    )
    trust_remote_code: bool = option(False, "Run the model code that comes with a Hub model.")
    attn_implementation: str | None = option(
        None, "Any of transformers' names, without effect: attention is always packed (varlen kernels on a GPU)."
    )
    use_peft: bool = option(
        False, "Train low-rank adapters (LoRA, arXiv:2106.09685) through peft; the model is frozen."
    )
    lora_r: int = option(16, "Rank of the adapters.", ge=1)
    lora_alpha: float = option(32, "Adapters are scaled by lora_alpha / lora_r.")
    lora_dropout: float = option(
        0.05, "Dropout before the adapters in SFT; GRPO uses 0, because its sampler has no dropout.", ge=0, lt=1
    )
    lora_target_modules: list[str] | None = option(
        None,
        "Modules that get adapters, by the end of their names, or all-linear; default: peft's for the architecture.",
    )
    lora_modules_to_save: list[str] | None = option(None, "Modules trained whole, in addition to the adapters.")
    lora_task_type: Literal["CAUSAL_LM"] = option("CAUSAL_LM", "The only supported task.")
    use_rslora: bool = option(False, "Scale by lora_alpha / sqrt(lora_r) instead (arXiv:2312.03732).")
    use_dora: bool = option(False, "Train each adapted weight's column norms separately (DoRA, arXiv:2402.09353).")
    load_in_8bit: bool = option(False, "Keep the frozen model in 8 bits (bitsandbytes); needs use_peft.")
    load_in_4bit: bool = option(False, "Keep the frozen model in 4 bits (QLoRA, arXiv:2305.14314); needs use_peft.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "Data type for 4 bits.")
    use_bnb_nested_quant: bool = option(False, "Quantise the 4-bit scales too.")

    @property
    def torch_dtype(self) -> str | None:
        """The older name of `dtype`, for scripts that read it."""
        return self.dtype

    def check_given(self) -> None:
        require(self.model_name_or_path != "", "--model_name_or_path is missing: give a Hub id or a model folder.")

    def check(self) -> None:
        super().check()
        require(not (self.load_in_4bit and self.load_in_8bit), "give only one of load_in_4bit and load_in_8bit.")
        require(
            self.use_peft or not (self.load_in_4bit or self.load_in_8bit),
            "a quantised model cannot be trained whole: give --use_peft true with load_in_4bit or load_in_8bit, or "
            "leave them out.",
        )


@dataclass
class DatasetConfig(Options):
    """One data set of a mixture."""

    id: str = option("", "A Hub id or a data file.")
    config: str | None = option(None, "Configuration (subset) of a Hub data set.")
    split: str = option("train", "Split to take.")
    columns: list[str] | None = option(None, "Columns to keep; default: all.")
    weight: float = option(1.0, "Share of the set's rows to take.", gt=0, le=1)

    def check(self) -> None:
        require(self.id != "", "each of the `datasets` of dataset_mixture needs an `id`.")
        super().check()


@dataclass
class DatasetMixtureConfig(Options):
    datasets: list[JsonDict] = option([], "See DatasetConfig.")
    seed: int = option(0, "Seed of the shuffles.")
    test_split_size: float | None = option(None, "Share or number of the rows to evaluate on.", gt=0)

    def check(self) -> None:
        super().check()
        require(
            self.datasets != [],
            "dataset_mixture has no `datasets`: give a list of entries with an `id` (`seed` and `test_split_size` are "
            "optional).",
        )
        self.sets()

    def sets(self) -> list[DatasetConfig]:
        return [DatasetConfig(**entry) for entry in self.datasets]


@dataclass
class ScriptArguments(Options):
    dataset_name: str = option(
        "", "Data: a Hub id, a .json/.jsonl/.parquet file (JSON also as .gz), or a folder of either kind."
    )
    dataset_config: str | None = option(None, "Configuration (subset) of a Hub data set.")
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str = option("test", "Split to evaluate on; if dataset_name is a file, another data file.")
    dataset_mixture: JsonDict | None = option(
        None,
        "Replaces dataset_name: {datasets: [{id, config, split, columns, weight}], seed, test_split_size}; weight is "
        "the share of that set's rows to take.",
    )

    def check_given(self) -> None:
        given = self.dataset_name or self.dataset_mixture
        require(bool(given), "--dataset_name is missing: give a Hub id or a data file.")

    def check(self) -> None:
        super().check()
        require(
            not (self.dataset_name and self.dataset_mixture),
            "give either --dataset_name (a Hub id or a data file) or a dataset_mixture, not both.",
        )
        self.mixture()

    def mixture(self) -> DatasetMixtureConfig | None:
        return DatasetMixtureConfig(**self.dataset_mixture) if self.dataset_mixture else None
