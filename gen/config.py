"""Options of `gen.generate`: open-r1's flags and defaults, and a few of ours, in one flat frozen dataclass."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from sft_core.run.options import Options, option, require

# What a generation depends on, besides the rows and the model's weights: may not differ when a run is continued.
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
    """How every prompt is continued. Sample i of the prompt at position p has the seed `seed_of(p) + i`."""

    n: int  # answers to each prompt
    max_tokens: int  # of an answer
    temperature: float | None = None  # 0: the most likely token; None: the server's default, and 1 in this process
    top_p: float | None = None  # None: the same
    seed: int | None = None  # None: no seed for a server, and 0 in this process

    def __post_init__(self) -> None:
        require(
            self.temperature != 0 or self.n == 1,
            "temperature 0 gives the same text every time: set --num_samples (or --num_generations) to 1, or use a "
            "temperature above 0.",
        )

    def seed_of(self, position: int) -> int:
        return (self.seed or 0) * 1_000_003 + position * self.n

    def request(self, model: str, messages: list[dict[str, str]], position: int, i: int) -> dict[str, Any]:
        """What a server is asked for sample `i` of the prompt at `position`."""
        seed = None if self.seed is None else self.seed_of(position) + i
        options = {"temperature": self.temperature, "top_p": self.top_p, "seed": seed}
        set_options = {name: value for name, value in options.items() if value is not None}
        return {"model": model, "messages": messages, "max_tokens": self.max_tokens} | set_options


def split_urls(text: str) -> list[str]:
    return [url.strip() for url in text.split(",") if url.strip()]


def check_urls(urls: list[str], option: str) -> None:
    """Raise ValueError unless these, given with `option`, can be addresses of servers."""
    require(bool(urls), f"{option} is empty: write it as http://host:8000/v1.")
    for url in urls:
        secret = re.match(r"https?://[^/]*@", url)
        require(secret is None, f"{option} holds a user name or password before @: set OPENAI_API_KEY instead.")
        address = re.match(r"https?://[^/]", url)
        require(address is not None, f"{option} {url!r} is no address: write it as http://host:8000/v1.")


@dataclass
class GenerateConfig(Options):
    hf_dataset: str = option(
        "", "Prompts: a Hub id, a .json/.jsonl/.parquet file (JSON also as .gz), or a saved data set."
    )
    model: str = option("", "Model by the name that the server knows; in process a Hub id or a folder.")
    hf_dataset_config: str | None = option(None, "Configuration (subset) of a Hub data set.")
    hf_dataset_split: str = option("train", "Split of the data set.")
    prompt_column: str = option("prompt", "Column that the template knows as `instruction`.")
    prompt_template: str = option("{{ instruction }}", "Jinja; knows the other columns by their names.")
    system_prompt: str | None = option(None, "System message before each prompt.")
    vllm_server_url: list[str] = option(
        ["http://localhost:8000/v1"], "OpenAI-compatible servers: repeat the flag, or put commas between."
    )
    temperature: float | None = option(None, "Sampling temperature; default: the server's (in process 1).", ge=0)
    top_p: float | None = option(None, "Nucleus sampling; default: the server's (in process 1).", gt=0, le=1)
    max_new_tokens: int = option(8192, "Longest generation in tokens.", ge=1)
    num_generations: int = option(1, "Generations to each prompt.", ge=1)
    seed: int | None = option(
        None, "Sample i of prompt p gets seed * 1000003 + p * num_generations + i; default: none."
    )
    limit: int | None = option(None, "Only the first so many rows.", ge=1)
    output_dir: str | None = option(
        None, "Folder for what is generated; the same command goes on there. Default: data/generated/ and a hash."
    )
    hf_output_dataset: str | None = option(None, "Hub data set to push to at the end.")
    private: bool = option(False, "Make it private where it is new.")
    input_batch_size: int = option(64, "Prompts to a file.", ge=1)
    client_replicas: int = option(1, "Multiplies the requests in flight; with --executor ray, its workers.", ge=1)
    max_concurrent: int | None = option(
        None,
        "Requests in flight, all servers together; default: client_replicas x input_batch_size x num_generations.",
        ge=1,
    )
    timeout: float = option(600, "Seconds that one request may take, and that no server may be usable.", gt=0)
    retries: int = option(0, "Times a request is sent again that failed while its server is well.", ge=0)
    engine: Literal["server", "vllm", "torch"] = option(
        "server", "What samples: a server, or in this process (one a GPU) vLLM or plain torch."
    )
    executor: Literal["local", "ray"] = option("local", "What asks the servers: this process, or workers of Ray Data.")
    shard: str | None = option(None, "For internal use: the part i/n of the batches that this process does.")

    def check(self) -> None:
        require(self.hf_dataset != "", "--hf-dataset is missing: give a Hub id or a data file.")
        require(self.model != "", "--model is missing: give the name that the server knows.")
        super().check()
        require(
            self.executor == "local" or self.engine == "server",
            "--executor ray asks servers: start them (vllm serve), or use --executor local, which has an engine "
            "on every GPU of this machine.",
        )
        check_urls(self.urls, "--vllm-server-url")
        self.sampling()  # it is checked when it is made

    def sampling(self) -> TextSampling:
        return TextSampling(self.num_generations, self.max_new_tokens, self.temperature, self.top_p, self.seed)

    @property
    def urls(self) -> list[str]:
        return split_urls(",".join(self.vllm_server_url))

    @property
    def at_once(self) -> int:
        return self.max_concurrent or self.client_replicas * self.input_batch_size * self.num_generations
