"""The quickstart's task: splits without common sums, right answers, and a tokenizer and a model that load."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_core.quickstart import draw, task

ADDS = ("finds", "got", "adds", "together", "more than")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return written(tmp_path_factory.mktemp("data"), seed=3)


def written(folder, **options):
    task.write_data(folder, **options)
    files = {split: folder / f"{split}.jsonl" for split in ("demonstrations", "train", "heldout")}
    return {split: [json.loads(line) for line in file.read_text().splitlines()] for split, file in files.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return task.write_model(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def solve(text: str) -> int:
    """Solve a problem from its text alone, without the program that wrote it."""
    a, b = map(int, re.findall(r"\d+", text))
    return a + b if any(word in text for word in ADDS) else a - b


def sums(texts) -> set:
    return {(any(w in t for w in ADDS), frozenset(re.findall(r"\d+", t))) for t in texts}


def test_no_sum_is_in_two_splits_or_twice_in_one(data):
    texts = {
        "demonstrations": [row["messages"][0]["content"] for row in data["demonstrations"]],
        "train": [row["prompt"] for row in data["train"]],
        "heldout": [row["prompt"] for row in data["heldout"]],
    }
    found = {split: sums(rows) for split, rows in texts.items()}
    assert {split: len(rows) for split, rows in found.items()} == {split: len(rows) for split, rows in texts.items()}
    assert not found["heldout"] & (found["train"] | found["demonstrations"])
    assert not found["train"] & found["demonstrations"]
    assert len(texts["heldout"]) >= 400


def test_solutions_are_right(data):
    for row in data["train"] + data["heldout"]:
        assert row["solution"] == str(solve(row["prompt"]))
    additions = sum(any(word in row["prompt"] for word in ADDS) for row in data["train"])
    assert 0.4 < additions / len(data["train"]) < 0.6


def read_demonstration(row):
    """(right answer, given answer, [(expression, given result)])"""
    user, assistant = row["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    match = re.fullmatch(r"<think>(.*)</think><answer>(\d+)</answer>", assistant["content"], flags=re.DOTALL)
    assert match
    question, *steps = match[1].split("\n")
    assert eval(question.strip()) == solve(user["content"]) and len(steps) == 2
    return solve(user["content"]), int(match[2]), [(left, int(right)) for left, right in (s.split("=") for s in steps)]


def test_without_slips_every_line_is_true_and_leads_to_the_answer(tmp_path):
    for row in written(tmp_path, slips=0)["demonstrations"]:
        right, given, steps = read_demonstration(row)
        assert given == right == 10 * steps[1][1] + steps[0][1]
        assert all(eval(left) == result and 0 <= result < 10 for left, result in steps)


def test_one_column_in_five_slips_and_the_answer_follows(data):
    slips = []
    for row in data["demonstrations"]:
        right, given, steps = read_demonstration(row)
        assert given == 10 * steps[1][1] + steps[0][1] % 10
        slips += [eval(left) != result for left, result in steps]
        assert all(abs(eval(left) - result) <= 2 for left, result in steps)
    assert 0.15 < sum(slips) / len(slips) < 0.25


def test_one_seed_one_task(tmp_path, data):
    assert written(tmp_path / "same", seed=3) == data
    other = written(tmp_path / "other", seed=4)
    assert all(other[split] != rows for split, rows in data.items())


def test_too_many_problems_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="request fewer"):
        task.write_data(tmp_path, train=10**6)


def test_tokenizer_round_trip(tokenizer, data):
    texts = [row["messages"][i]["content"] for row in data["demonstrations"] for i in (0, 1)]
    for text in [*texts, "Žofie zaplatila 12,50 €\n\t  <b>", "  7 + 8\n"]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert max(len(tokenizer(text)["input_ids"]) for text in texts) <= 32


def test_chat_template_ends_turns_and_marks_the_assistant(tokenizer, data):
    messages = data["demonstrations"][0]["messages"]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = whole["input_ids"], whole["assistant_masks"]
    assert ids[: len(prompt)] == prompt and ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    assert tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True) == messages[1]["content"]


def test_model_loads_as_any_other_and_depends_on_its_seed_only(folder, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    config, special = model.config, (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert 2e6 < model.num_parameters() < 4e6
    assert config.hidden_size // config.num_attention_heads in (32, 64, 80, 96, 112, 128)  # vLLM on the CPU
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == special
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert config.vocab_size == len(tokenizer)
    ids = torch.tensor([tokenizer("Anna has 12 pens.")["input_ids"]])
    assert torch.isfinite(model(ids).logits).all()
    torch.manual_seed(99)
    again = AutoModelForCausalLM.from_pretrained(task.write_model(tmp_path / "again", seed=3))
    other = AutoModelForCausalLM.from_pretrained(task.write_model(tmp_path / "other", seed=4))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "again").get_vocab() == tokenizer.get_vocab()


def test_the_picture_is_drawn_from_the_metrics(tmp_path):
    (tmp_path / "grpo").mkdir()
    rows = [{"step": step, "reward": step / 40, "other": None} for step in (10, 20, 30)]
    (tmp_path / "grpo" / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    draw.draw(tmp_path, tmp_path / "reward.png")
    committed = Path(draw.__file__).with_name("reward.png")
    for image in (tmp_path / "reward.png", committed):
        assert image.read_bytes().startswith(b"\x89PNG") and 2_000 < image.stat().st_size < 60_000
