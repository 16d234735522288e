"""Run the Python blocks of TRL's documentation on text-only GRPO and SFT with this project, and list which ones run.

    python tests/e2e/trl_blocks.py TRL/docs/source [--only grpo_trainer:428] [--scratch FOLDER]

Each block runs as a separate script. In its text, `trl` is replaced by `grpo_core`, and the names of models and data
sets by folders with tiny ones. Steps and lengths that the block does not set are small, and it samples with torch. A
block that only creates options or a reward function is followed by a short training with them. A block of `>>>` lines
runs after the block before it and must print what it shows, except for a model's text. Names that a block leaves to the
reader (its checkers, its data) are defined first. A fragment with `...` in a call is not a program and is counted
separately: the dots are removed, or replaced by what a trainer needs.

It prints a table, and exits with 1 if a block on text-only GRPO or SFT does not run.
"""

import argparse
import ast
import json
import os
import re
import runpy
import sys
import tempfile
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = ("quickstart.md", "grpo_trainer.md", "sft_trainer.md")
OTHERS = {  # the topics of blocks that are not about text-only GRPO or SFT
    r"\bDPO\w+\(": "DPO",
    r"\bRewardTrainer\(": "a reward model",
    r"environment_factory": "environments",
    r"\btools=": "tools",
    r"Image\.open|-VL-|llava": "images",
}
BLOCK = re.compile(r"^(?P<indent>[ >]*)```python\n(?P<text>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)
MODEL = re.compile(r'"(?:Qwen|HuggingFaceTB)/[^"]+"')
DATA = re.compile(r'"((?:trl-lib|FreedomIntelligence)/[^"]+)"')

BEFORE = """\
import asyncio, functools, os, torch
import grpo_core
from grpo_core import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from transformers import AutoModelForCausalLM

def short(config, **defaults):
    first = config.__init__
    def init(self, *positional, **given):
        first(self, *positional, **(defaults | given))
    config.__init__ = functools.wraps(first)(init)

short(GRPOConfig, max_steps=2, num_generations=4, per_device_train_batch_size=8, max_completion_length=8,
      use_vllm=False, report_to="none", logging_steps=1, save_strategy="no", reward_num_workers=1)
short(SFTConfig, max_steps=2, per_device_train_batch_size=2, report_to="none", logging_steps=1, save_steps=2)

def check_math_solution(prompt, completion):
    return len(completion) % 2 == 0

def test_code_solution(prompt, completion):
    return len(completion) % 2 == 0

def reward_func(completions, **kwargs):
    return [float(len(completion)) for completion in completions]

async def async_reward_func1(completions, **kwargs):
    return [1.0 if completion else 0.0 for completion in completions]

async def async_reward_func2(completions, **kwargs):
    return [float(completion.count("a")) for completion in completions]

def rows(name):
    from datasets import load_dataset
    return load_dataset(os.path.join(DATA, name), split="train")
"""
# The arguments of a trainer that a fragment leaves to the reader.
FILL = {
    "GRPO": 'model=MODEL, train_dataset=rows("text"), reward_funcs=reward_func',
    "SFT": 'model=MODEL, train_dataset=rows("trl-lib/Capybara")',
}


@dataclass
class Block:
    file: str
    line: int  # number of its first line
    text: str
    kind: str  # GRPO, SFT, or another topic
    dots: bool  # a call in it has ... among its arguments

    @property
    def name(self) -> str:
        return f"{Path(self.file).stem}:{self.line}"

    @property
    def words(self) -> str:
        """The first line with content, cut to the width of the table."""
        lines = [line for line in self.text.splitlines() if line.strip() and not re.match(r"(from|import) ", line)]
        return lines[0].strip()[:60].replace("|", "/")


def blocks_of(path: Path) -> list[Block]:
    text, found = path.read_text(), []
    for match in BLOCK.finditer(text):
        lines = [line.removeprefix(match["indent"]) for line in match["text"].splitlines()]
        code = textwrap.dedent("\n".join(lines)) + "\n"
        about = [kind for pattern, kind in OTHERS.items() if re.search(pattern, code)]
        kind = (
            about[0]
            if about
            else "SFT"
            if path.name.startswith("sft") or "SFTConfig" in code or "SFTTrainer" in code
            else "GRPO"
        )
        dots = bool(re.search(r"^\s*\.\.\.,?$|, \.\.\.\)$|^\s*\.\.\.\s*$", code, re.MULTILINE)) and ">>>" not in code
        found.append(Block(path.name, text[: match.start()].count("\n") + 2, code, kind, dots))
    return found


def write_inputs(folder: Path) -> None:
    """Write a tiny model, adapters for it, and tiny data in the format of each data set."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from grpo_core.quickstart.task import make_tokenizer

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), **shape, max_position_embeddings=2048, tie_word_embeddings=True, **ids
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(folder / "data/trl-lib/Qwen3-4B-LoRA")
    tokenizer.save_pretrained(folder / "data/trl-lib/Qwen3-4B-LoRA")

    def say(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    numbers = range(1, 25)
    data: dict[str, list[dict]] = {
        "trl-lib/Capybara": [
            {"messages": say("user", f"{i} + 1?") + say("assistant", f"It is {i + 1}.")} for i in numbers
        ],
        "trl-lib/DeepMath-103K": [
            {"prompt": say("user", f"What is {i} + 1?"), "solution": str(i + 1)} for i in numbers
        ],
        "trl-lib/kto-mix-14k": [
            {"prompt": say("user", f"{i}?"), "completion": say("assistant", f"{i}."), "label": i % 2 == 0}
            for i in numbers
        ],
        "FreedomIntelligence/medical-o1-reasoning-SFT": [
            {"Question": f"What is {i}?", "Complex_CoT": "A number.", "Response": f"{i}."} for i in numbers
        ],
        "text": [{"prompt": f"What is {i} + 1?", "ground_truth": str(i + 1)} for i in numbers],
        "chat": [{"prompt": say("user", f"What is {i} + 1?")} for i in numbers],
    }
    for name, rows in data.items():
        place = folder / "data" / name
        place.mkdir(parents=True)
        (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: train.jsonl\n---\n"
    (folder / "data/FreedomIntelligence/medical-o1-reasoning-SFT/README.md").write_text(card)


def mapped(code: str, folder: Path) -> str:
    code = re.sub(r"\bfrom trl(?=[ .])", "from grpo_core", code)
    code = MODEL.sub(f'"{folder / "model"}"', code)
    return DATA.sub(lambda match: f'"{folder / "data" / match[1]}"', code)


def without_dots(block: Block) -> str:
    fill = FILL[block.kind]

    def filled(match: re.Match) -> str:
        given = re.findall(r"(\w+)=", match[0])
        needed = [part for part in fill.split(", ", 2) if part.split("=")[0] not in given]
        return match[0].replace("...", ", ".join(needed), 1)

    code = re.sub(r"\b\w+Trainer\(.*?^\)", filled, block.text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^\s*\.\.\.,?\n|, \.\.\.(?=\))", "", code, flags=re.MULTILINE)


def after(code: str, kind: str) -> str:
    """A short training with what the block created, if the block does not train."""
    if "Trainer(" in code:
        return "" if ".train()" in code else "trainer.train()\n"
    if "dataset = " in code:
        return 'SFTTrainer(model=MODEL, train_dataset=dataset["train"]).train()\n'
    lines = code.splitlines()
    config = re.search(r"\b(\w+)Config\(", code)
    if config:
        made = "training_args" if "training_args" in code else lines[-1].strip()
        return f"{config[1]}Trainer({FILL[config[1]]}, args={made}).train()\n"
    if functions := re.findall(r"^(?:async )?def (\w+)\(", code, re.MULTILINE):
        data = "chat" if '["content"]' in code else "text"
        return f'GRPOTrainer(model=MODEL, train_dataset=rows("{data}"), reward_funcs={functions[-1]}).train()\n'
    if code.startswith("model = "):
        return 'SFTTrainer(model=model, train_dataset=rows("trl-lib/Capybara")).train()\n'
    shown = [ast.unparse(node.value) for node in ast.parse(code).body if isinstance(node, ast.Expr)]
    made = f"from datasets import Dataset\nfor row in [{', '.join(shown)}]:\n"
    return f"{made}    SFTTrainer(model=MODEL, train_dataset=Dataset.from_list([row] * 4)).train()\n"


def script(block: Block, earlier: list[str], folder: Path) -> str:
    """The program of a block; it continues the `earlier` blocks."""
    begin = f"MODEL, DATA = {str(folder / 'model')!r}, {str(folder / 'data')!r}\n{BEFORE}"
    if ">>>" not in block.text:
        code = without_dots(block) if block.dots else block.text
        return mapped("\n".join([begin, code, after(code, block.kind)]), folder)
    code = mapped(re.sub(r"checkpoint-\d+", "checkpoint-2", block.text), folder)
    check = "doctest.DebugRunner().run(test)" if "pipe" not in code else "[exec(e.source) for e in test.examples]"
    text = [begin, *(mapped(e, folder) if ">>>" not in e else "" for e in earlier), "import doctest"]
    dialogues = [e for e in earlier if ">>>" in e] + [block.text]
    code = mapped(re.sub(r"checkpoint-\d+", "checkpoint-2", "\n".join(dialogues)), folder)
    text += [f"test = doctest.DocTestParser().get_doctest({code!r}, globals(), 'block', None, 0)", check, ""]
    return "\n".join(text)


def run(block: Block, earlier: list[str], folder: Path) -> str:
    """Run a program; return "" if it succeeds, else the last line of its output."""
    place = folder / block.name.replace(":", "-")
    place.mkdir()
    (place / "block.py").write_text(script(block, earlier, folder))
    if (child := os.fork()) == 0:  # a child process that already has the imports
        with (place / "log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.chdir(place)
        sys.argv = ["block.py"]
        code = 1
        try:
            runpy.run_path("block.py", run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = (place / "log").read_text().strip().splitlines()
    return (
        ""
        if status == 0
        else next((line for line in said[::-1] if re.match(r"[\w.]+(Error|Exit)\b", line)), f"exit code {status}")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="docs/source of TRL's repository")
    parser.add_argument("--only", nargs="*", default=[], metavar="FILE:LINE", help="only these blocks")
    parser.add_argument("--scratch", type=Path, help="where scripts and logs are kept (default: nowhere)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.scratch or Path(temporary)).resolve()
        sys.path.insert(0, str(ROOT))
        from tests.commands import environment

        os.environ |= environment(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(folder / "cache"))
        if (child := os.fork()) == 0:  # a process that has used torch's threads cannot be forked
            write_inputs(folder)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        import grpo_core.trainer  # noqa: F401, for the blocks

        counts = {"runs": 0, "does not run": 0}
        fragments = dict(counts)
        print("| block | first words | about | result |\n| --- | --- | --- | --- |", flush=True)
        for name in FILES:
            earlier: list[str] = []
            for block in blocks_of(arguments.folder / name):
                if ">>>" not in block.text:
                    earlier = []
                if not arguments.only or block.name in arguments.only:
                    result = "not text-only GRPO or SFT"
                    if block.kind in FILL:
                        error = run(block, earlier, folder)
                        outcome = "does not run" if error else "runs"
                        (fragments if block.dots else counts)[outcome] += 1
                        result = outcome + (", dots filled in" if block.dots else "") + (f": {error}" if error else "")
                    print(f"| {block.name} | `{block.words}` | {block.kind} | {result} |", flush=True)
                earlier.append(block.text)
    print(f"\nText-only GRPO and SFT: {counts['runs']} of {sum(counts.values())} run.")
    print(
        f"Fragments with `...` in a call: {fragments['runs']} of {sum(fragments.values())} run with the dots filled in."
    )
    return int(bool(counts["does not run"]))


if __name__ == "__main__":
    sys.exit(main())
