"""Options of `gen.generate`: open-r1's flags and defaults plus a few more, in one flat dataclass."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from sft_core.run.options import Options, option, require

# The options that the generations depend on, besides the rows and the weights: a resumed run must have the same.
IDENTITY = (
    "model",
    "prompt_column",
    "prompt_template",
    "system_prompt",
    "temperature",
    "top_p",
    "max_new_tokens",
    "num_generations",
    "input_batch_size",
    "seed",
    "engine",
)


@dataclass(frozen=True)
class TextSampling:
    """Sampling options for all prompts. Sample i of the prompt at position p has the seed `seed_of(p) + i`."""

    n: int  # answers per prompt
    max_tokens: int  # per answer
    temperature: float | None = None  # 0: greedy; None: the server's default, or 1 for an engine in this process
    top_p: float | None = None  # None: the server's default, or 1 for an engine in this process
    seed: int | None = None  # None: a server gets no seed, an engine in this process gets 0

    def __post_init__(self) -> None:
        require(
            self.temperature != 0 or self.n == 1,
            "temperature 0 gives the same text every time: set --num_samples (or --num_generations) to 1, or use a "
            "temperature above 0.",
        )

    def seed_of(self, position: int) -> int:
        return (self.seed or 0) * 1_000_003 + position * self.n

    def request(self, model: str, messages: list[dict[str, str]], position: int, i: int) -> dict[str, Any]:
        """The request to a server for sample `i` of the prompt at `position`."""
        seed = None if self.seed is None else self.seed_of(position) + i
        options = {"temperature": self.temperature, "top_p": self.top_p, "seed": seed}
        set_options = {name: value for name, value in options.items() if value is not None}
        return {"model": model, "messages": messages, "max_tokens": self.max_tokens} | set_options


def split_urls(text: str) -> list[str]:
    return [url.strip() for url in text.split(",") if url.strip()]


def check_urls(urls: list[str], option: str) -> None:
    """Raise ValueError unless these values of `option` are valid server addresses."""
    require(bool(urls), f"{option} is empty: write it as http://host:8000/v1.")
    for url in urls:
        secret = re.match(r"https?://[^/]*@", url)
        require(secret is None, f"{option} contains a user name or password before @: set OPENAI_API_KEY instead.")
        address = re.match(r"https?://[^/]", url)
        require(address is not None, f"{option} {url!r} is not a valid address: write it as http://host:8000/v1.")


@dataclass
class GenerateConfig(Options):
    hf_dataset: str = option(
        "", "Prompts: a Hub id, a .json/.jsonl/.parquet file (JSON also as .gz), or a saved data set."
    )
    model: str = option("", "Model: the name under which the server serves it; in process, a Hub id or a folder.")
    hf_dataset_config: str | None = option(None, "Configuration (subset) of a Hub data set.")
    hf_dataset_split: str = option("train", "Split of the data set.")
    prompt_column: str = option("prompt", "Column that the template uses as `instruction`.")
    prompt_template: str = option("{{ instruction }}", "Jinja template; it can use the other columns by name.")
    system_prompt: str | None = option(None, "System message before each prompt.")
    vllm_server_url: list[str] = option(
        ["http://localhost:8000/v1"], "OpenAI-compatible servers: repeat the flag, or separate them with commas."
    )
    temperature: float | None = option(None, "Sampling temperature; default: the server's (in process 1).", ge=0)
    top_p: float | None = option(None, "Nucleus sampling; default: the server's (in process 1).", gt=0, le=1)
    max_new_tokens: int = option(8192, "Maximum number of tokens per generation.", ge=1)
    num_generations: int = option(1, "Generations per prompt.", ge=1)
    seed: int | None = option(
        None, "Seed: sample i of prompt p gets seed * 1000003 + p * num_generations + i; default: none."
    )
    limit: int | None = option(None, "Use only this many rows, the first ones.", ge=1)
    output_dir: str | None = option(
        None, "Output folder; the same command resumes there. Default: data/generated/ and a hash."
    )
    hf_output_dataset: str | None = option(None, "Hub data set to push to at the end.")
    private: bool = option(False, "Create the Hub data set as private.")
    input_batch_size: int = option(64, "Prompts per output file.", ge=1)
    client_replicas: int = option(1, "Multiplies the requests in flight; with --executor ray: number of workers.", ge=1)
    max_concurrent: int | None = option(
        None,
        "Requests in flight, over all servers; default: client_replicas x input_batch_size x num_generations.",
        ge=1,
    )
    timeout: float = option(600, "Seconds until a request times out, or until a run with no usable server ends.", gt=0)
    retries: int = option(0, "Retries of a request that failed while its server was up.", ge=0)
    engine: Literal["server", "vllm", "torch"] = option(
        "server", "Where to sample: on servers, or in this process (one per GPU) with vLLM or plain torch."
    )
    executor: Literal["local", "ray"] = option("local", "What sends the requests: this process, or Ray Data workers.")
    shard: str | None = option(None, "For internal use: this process does part i/n of the batches.")

    def check(self) -> None:
        require(self.hf_dataset != "", "--hf-dataset is missing: give a Hub id or a data file.")
        require(self.model != "", "--model is missing: give the name under which the server serves it.")
        super().check()
        require(
            self.executor == "local" or self.engine == "server",
            "--executor ray works with servers only: start them (vllm serve), or use --executor local, which runs an "
            "engine on every GPU of this machine.",
        )
        check_urls(self.urls, "--vllm-server-url")
        self.sampling()  # raises ValueError for bad values

    def sampling(self) -> TextSampling:
        return TextSampling(self.num_generations, self.max_new_tokens, self.temperature, self.top_p, self.seed)

    @property
    def urls(self) -> list[str]:
        return split_urls(",".join(self.vllm_server_url))

    @property
    def at_once(self) -> int:
        return self.max_concurrent or self.client_replicas * self.input_batch_size * self.num_generations
