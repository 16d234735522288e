"""GRPOTrainer: all kinds of rewards, unchanged prompts, the same loop as the command line, scripts like open-r1's."""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

import grpo_core.prepare
from gen.engine.base import make_engine
from grpo_core import GRPOConfig, GRPOTrainer
from grpo_core.rewards import get_cosine_scaled_reward
from tests.commands import ROOT, TORCHRUN, environment
from tests.grpo_core.test_train import TRAIN, options
from tests.launch import metrics, run
from tests.rewards_for_tests import digits

MESSAGES = [{"role": "user", "content": "Ben has 10 stones and finds 2."}]
ROWS = Dataset.from_list([{"prompt": f"Ben has {i} stones.", "level": i, "messages": MESSAGES} for i in range(8)])


def config(folder, **more):
    base = dict(use_vllm=False, max_steps=2, prompts_per_step=2, num_generations=4, max_prompt_length=60)
    base |= dict(max_completion_length=12, report_to="none", save_strategy="no", reward_num_workers=1)
    return GRPOConfig(output_dir=str(folder), **base | more)


def test_importing_the_package_imports_nothing_large():
    large = "'torch', 'transformers', 'vllm', 'datasets', 'sft_core.run.config'"
    code = f"import sys, grpo_core; found = [n for n in ({large}) if n in sys.modules]; assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
    assert all(getattr(grpo_core, name) is not None for name in grpo_core.__all__) and len(grpo_core.__all__) == 12
    with pytest.raises(AttributeError, match="no attribute 'PPOTrainer'"):
        _ = grpo_core.PPOTrainer


def test_rewards_of_every_kind_inside_a_running_loop(tiny_model, tmp_path, capsys):
    """It runs in an event loop, like a notebook's cells. A raw prompt gets no template; its completion is text."""
    seen, groups = [], []

    def closure(weight):
        return lambda completions, **columns: [weight * len(text) for text in completions]

    def here(completions, prompts, level, messages, trainer_state, **columns):
        seen.append((prompts[0], level[0], messages[0], trainer_state.global_step, len(completions)))
        return [float("nan") if level[0] == 3 else 1.0 for _ in completions]

    def whole(completions, completion_ids, **columns):
        groups.append(len(completions))
        return [float(len(ids)) for ids in completion_ids]

    async def waits(completions, **columns):
        await asyncio.sleep(0)
        return [None if text.startswith("1") else 0.5 for text in completions]

    longer = closure(0.5)
    longer.__name__ = "longer"
    here.in_process = whole.in_process = whole.batch = True
    rewards = [longer, here, whole, waits, "repetition_penalty", get_cosine_scaled_reward(max_len=9)]
    rows = ROWS.add_column("answer", [str(i) for i in range(8)])
    trainer = GRPOTrainer(
        tiny_model,
        rewards,
        config(tmp_path / "out", num_iterations=2, max_steps=4, beta=0.1, sync_ref_model=True, ref_model_sync_steps=3),
        train_dataset=rows,
        eval_dataset=rows,
    )

    async def cell():
        return trainer.train()

    result = asyncio.run(cell())
    assert result.global_step == 4 and result.metrics["train_samples"] == 8
    names = ["longer", "here", "whole", "waits", "repetition_penalty_reward", "cosine_scaled_reward"]
    assert all(f"rewards/{name}/mean" in trainer.state.log_history[0] for name in names)
    # before the run it is also called with three completions, to find out whether it compares them
    assert {(count, step) for *_, step, count in seen} == {(1, 0), (1, 2), (3, 0)} and set(groups) == {4}
    columns = [(row["prompt"], row["level"], row["messages"]) for row in rows]
    assert all((prompt, level, messages) in columns for prompt, level, messages, *_ in seen)
    recorded = json.loads((tmp_path / "out" / "run.json").read_text())
    assert recorded["options"]["reward_funcs"] == names
    shown = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    raw = {tokenizer.decode(tokenizer(row["prompt"])["input_ids"]) for row in rows}
    assert {row["prompt"] for row in shown} <= raw
    assert "text prompts do not use the chat template" in capsys.readouterr().out
    evaluated = trainer.evaluate()
    assert evaluated["eval_samples"] == 8 and evaluated["eval_rewards/waits/mean"] == 0.5
    assert trainer.evaluate()["eval_reward"] == evaluated["eval_reward"]  # the same weights, seeds and prompts


def test_the_loop_is_that_of_the_command_line(tiny_model, problems, tmp_path):
    """With conversations and the same options, losses and rewards are bitwise the same."""
    adaptive = {"use_adaptive_entropy": True, "entropy_coef": 0.5, "entropy_target": 99.0}
    argv = options(tiny_model, problems, tmp_path / "command", max_steps=2, prompts_per_step=2, **adaptive)
    code, output = run(TRAIN, argv, tmp_path / "log")
    assert code == 0, output
    rows = [json.loads(line) for line in Path(problems).read_text().splitlines()]
    rows = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    same = config(
        tmp_path / "out", max_prompt_length=100, learning_rate=1e-3, max_tokens_per_micro_batch=150, **adaptive
    )
    trainer = GRPOTrainer(tiny_model, digits, same, Dataset.from_list(rows))  # by position, as TRL's takes them
    trainer.train()
    keys = ("loss", "grad_norm", "rewards/digits/mean", "kl", "entropy_coef")
    there, here = ([[row[key] for key in keys] for row in metrics(tmp_path / f)] for f in ("command", "out"))
    assert there == here and there[0][1] > 0


@pytest.mark.parametrize("engine", ["torch", pytest.param("vllm", marks=pytest.mark.slow)])
def test_the_example_of_the_readme(tiny_model, tmp_path, monkeypatch, engine):
    """The example is unchanged, except that the model's name maps to a local model; quick: another engine than vLLM."""
    monkeypatch.setattr(grpo_core.prepare, "make_engine", lambda name, config: make_engine(engine, config))
    section = (ROOT / "README.md").read_text().partition("## From Python")[2]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    model = tmp_path / "model"
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(model)
    for file in Path(tiny_model).iterdir():
        text = file.read_bytes().replace(b'"max_position_embeddings": 256', b'"max_position_embeddings": 1024')
        (model / file.name).write_bytes(text)
    (tmp_path / "p.jsonl").write_text('{"prompt": "Ben has 10 stones."}\n')
    monkeypatch.chdir(tmp_path)
    assert example.count("HuggingFaceTB/SmolLM2-135M-Instruct") == 1
    space = {"__name__": "__main__"}
    exec(example.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(model)), space)
    (row,) = metrics(tmp_path / "out")
    assert row["rewards/reward_len/mean"] < 0 and row["completions/max_length"] > 20
    assert (tmp_path / "out" / "model.safetensors").is_file()


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"reward_funcs": None}, "reward_funcs is missing"),
        ({"reward_funcs": []}, "reward_funcs is missing"),
        ({"reward_funcs": 7}, "must be functions or names of rewards, got 7"),
        ({"reward_funcs": [digits, int]}, "must be functions or names of rewards, got <class 'int'>"),
        ({"reward_funcs": "acuracy"}, "unknown reward 'acuracy': did you mean 'accuracy'"),
        ({"reward_funcs": [digits, digits]}, "two reward functions are both named 'digits'"),
        (
            {"train_dataset": ROWS.rename_column("prompt", "problem")},
            "train_dataset has no column `prompt`, it has problem",
        ),
        ({"eval_dataset": ROWS.rename_column("prompt", "problem")}, "eval_dataset has no column `prompt`"),
        ({"train_dataset": None}, "train_dataset must be a datasets.Dataset"),
        ({"train_dataset": ROWS.to_iterable_dataset()}, "got IterableDataset"),
        ({"args": grpo_core.SFTConfig("o")}, "args must be a GRPOConfig"),
        ({"tools": [print]}, "GRPOTrainer does not take tools"),
    ],
)
def test_what_cannot_be_trained_is_said_when_the_trainer_is_made(tiny_model, tmp_path, more, says):
    given = {"model": tiny_model, "reward_funcs": digits, "args": config(tmp_path), "train_dataset": ROWS}
    with pytest.raises(ValueError, match=re.escape(says)):
        GRPOTrainer(**given | more)


@pytest.mark.parametrize(
    ("gives", "says"),
    [
        (lambda n: [1.0] * (n + 1), "reward must return a list of 1 rewards, but it returned [1.0, 1.0]"),
        (lambda n: [float("nan")] * n, "reward must return finite numbers, or None where it does not apply, not nan"),
        (lambda n: ["1"] * n, "reward must return finite numbers, or None where it does not apply, not '1'"),
        (lambda n: "1", "reward must return a list of 1 rewards, but it returned '1'"),
        (lambda n: 1 / 0, "reward failed with ZeroDivisionError"),
    ],
)
def test_a_reward_that_returns_none(tiny_model, tmp_path, gives, says):
    def reward(completions, **columns):
        return gives(len(completions))

    reward.in_process = True
    with pytest.raises(ValueError, match=re.escape(says)):
        GRPOTrainer(tiny_model, reward, config(tmp_path / "out"), train_dataset=ROWS).train()
    assert not (tmp_path / "out" / "run.json").exists()


# --- scripts like open-r1's --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    for split, count in (("train", 8), ("test", 3)):
        problems = [f"Ben has {i} stones and finds {i} more." for i in range(count)]
        rows = [
            {
                "problem": problem,
                "solution": str(2 * i),
                "messages": [{"role": "user", "content": problem}, {"role": "assistant", "content": f"It is {2 * i}."}],
            }
            for i, problem in enumerate(problems)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def script(kind, tiny_model, split_data, folder, **more):
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", split_data, "--output_dir", folder]
    flags += ["--eval_strategy", "steps", "--do_eval", "true", "--save_strategy", "steps", "--report_to", "none"]
    if kind == "grpo":
        flags += ["--use_vllm", "false", "--max_prompt_length", 60, "--max_completion_length", 12]
        flags += ["--num_generations", 4]
    else:
        flags += ["--max_length", 100]
    return [kind, *map(str, flags), *(f"--{name}={value}" for name, value in more.items())]


@pytest.mark.parametrize("kind", ["grpo", pytest.param("sft", marks=pytest.mark.slow)])
def test_a_script_on_two_ranks_and_again_on_one(kind, tiny_model, split_data, tmp_path):
    for ranks, steps in ((2, 1), (1, 2)):
        argv = script(kind, tiny_model, split_data, tmp_path / "out", max_steps=steps)
        code, output = run("tests.open_r1_script", argv, tmp_path / f"log{ranks}", ranks=ranks)
        assert code == 0, output
    assert "resuming from" in output
    rows = metrics(tmp_path / "out")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["train_samples"] == 8 and results["eval_samples"] == 3 and "train_loss" in results
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a-tag" in card and str(split_data) in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"] is True


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[*TORCHRUN, "2"], [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]])
def test_a_script_under_its_launchers(launcher, tiny_model, split_data, tmp_path):
    argv = script("sft", tiny_model, split_data, tmp_path / "out", max_steps=1)
    command = [*launcher, str(ROOT / "tests" / "open_r1_script.py"), *argv]
    subprocess.run(command, check=True, env=environment(), timeout=300)
    assert (tmp_path / "out" / "train_results.json").is_file()
