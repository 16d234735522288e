"""The task of `make quickstart`: generated arithmetic word problems with a fixed seed, and a small decoder to train.

A problem asks to add or subtract two numbers from 10 to 99, without carrying or borrowing. A demonstration works out
the ones and then the tens. One column in five is wrong in it, which makes the answer wrong too. A model that imitates
the demonstrations makes as many errors; a reward for correct answers can remove them. GRPO's effect is therefore
visible within minutes.

No problem of one split is in another, neither with the same numbers and operation nor as the same addition with its
numbers swapped. Not supported, on purpose: more steps, other operations, prose in the working. Run it:

    python -m grpo_core.quickstart.task FOLDER     # FOLDER/model, demonstrations.jsonl, train.jsonl, heldout.jsonl
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo")
OBJECTS = ("pens", "books", "coins", "cards", "shells", "stamps", "apples", "stones")
TEMPLATES = {
    "+": (
        "{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?",
        "{name} had {a} {things} and got {b} from {other}. How many {things} does {name} have now?",
        "There are {a} {things} in a box. {name} adds {b} more. How many {things} are in the box now?",
        "{name} has {a} {things} and {other} has {b}. How many {things} do they have together?",
        "{name} has {a} {things}. {other} has {b} more than {name}. How many {things} does {other} have?",
    ),
    "-": (
        "{name} has {a} {things} and loses {b} of them. How many {things} does {name} have now?",
        "{name} had {a} {things} and gave {b} to {other}. How many {things} does {name} have now?",
        "There are {a} {things} in a box. {name} takes {b} away. How many {things} are in the box now?",
        "{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have?",
        "{name} has {a} {things}. {other} has {b} fewer than {name}. How many {things} does {other} have?",
    ),
}
BOS, PAD, USER, ASSISTANT, END = "<|bos|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|user|>' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Problem:
    a: int
    b: int
    operation: str  # "+" or "-"
    text: str

    @property
    def answer(self) -> int:
        return self.a + self.b if self.operation == "+" else self.a - self.b


def write_problem(rng: random.Random, operation: str, a: int, b: int) -> Problem:
    name, other = rng.sample(NAMES, 2)
    template = rng.choice(TEMPLATES[operation])
    return Problem(a, b, operation, template.format(a=a, b=b, name=name, other=other, things=rng.choice(OBJECTS)))


def columns(problem: Problem) -> list[tuple[str, int]]:
    """The columns to work out with their results, ones before tens: 47+32 is [("7+2", 9), ("4+3", 7)]."""
    (a_tens, a_ones), (b_tens, b_ones) = divmod(problem.a, 10), divmod(problem.b, 10)
    sign = 1 if problem.operation == "+" else -1
    return [
        (f"{a_ones}{problem.operation}{b_ones}", a_ones + sign * b_ones),
        (f"{a_tens}{problem.operation}{b_tens}", a_tens + sign * b_tens),
    ]


def write_demonstration(problem: Problem, rng: random.Random, slips: float) -> str:
    """A working in which each column is wrong by 1 or 2 with probability `slips`, and the answer that results."""
    lines, digits = [], []
    for task, result in columns(problem):
        if rng.random() < slips:
            result = max(0, result + rng.choice((-2, -1, 1, 2)))
        lines.append(f"{task}={result}")
        digits.append(result)
    working = "\n".join([f" {problem.a}{problem.operation} {problem.b}", *lines])
    return f"<think>{working}</think><answer>{10 * digits[1] + digits[0] % 10}</answer>"


def make_splits(seed: int, sizes: dict[str, int]) -> dict[str, list[Problem]]:
    """Problems for every split of `sizes`, all different. On average half are additions and half subtractions."""
    rng = random.Random(seed)
    additions = [(a, b) for a in range(10, 90) for b in range(10, min(a, 99 - a) + 1) if a % 10 + b % 10 < 10]
    subtractions = [(a, b) for a in range(10, 100) for b in range(10, a) if a % 10 >= b % 10]
    keys = [("+", a, b) for a, b in additions] + [("-", a, b) for a, b in rng.sample(subtractions, len(additions))]
    if sum(sizes.values()) > len(keys):
        raise ValueError(f"{sum(sizes.values())} problems are requested, but {len(keys)} exist: request fewer")
    rng.shuffle(keys)
    splits = {}
    for split, size in sizes.items():
        taken, keys = keys[:size], keys[size:]
        turned = [(op, b, a) if op == "+" and rng.random() < 0.5 else (op, a, b) for op, a, b in taken]
        splits[split] = [write_problem(rng, *key) for key in turned]
    return splits


def write_data(
    folder: str | Path,
    seed: int = 0,
    demonstrations: int = 700,
    train: int = 800,
    heldout: int = 500,
    slips: float = 0.2,
) -> None:
    """Write demonstrations.jsonl ({"messages"}), train.jsonl and heldout.jsonl ({"prompt", "solution"})."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    splits = make_splits(seed, {"heldout": heldout, "demonstrations": demonstrations, "train": train})
    shown = [
        {
            "messages": [
                {"role": "user", "content": p.text},
                {"role": "assistant", "content": write_demonstration(p, rng, slips)},
            ]
        }
        for p in splits["demonstrations"]
    ]
    rows: dict[str, list[dict]] = {"demonstrations": shown}
    for split in ("train", "heldout"):
        rows[split] = [{"prompt": p.text, "solution": str(p.answer)} for p in splits[split]]
    for split, of_split in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_split))


def make_tokenizer():
    """A byte-level BPE tokenizer with one token for each word of the task and for each digit. Any text round-trips."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d| ?\p{L}+|\s|[^\s\p{L}\d]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = [*NAMES, *OBJECTS, *(t for of_one in TEMPLATES.values() for t in of_one), *(str(a) for a in range(10, 100))]
    corpus = [f"{word} {word}" for word in words]
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        min_frequency=1,
        show_progress=False,
        special_tokens=[PAD, BOS, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in ("<think>", "</think>", "<answer>", "</answer>")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_model(folder: str | Path, seed: int = 0) -> Path:
    """Write a randomly initialised Llama with 2.5 million parameters, and its tokenizer, as a Hugging Face folder."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=3,
        num_attention_heads=8,  # head size 32, the smallest that vLLM supports on the CPU
        num_key_value_heads=8,
        initializer_range=0.06,  # 0.02 is for wider models; here it doubles the steps until the model copies numbers
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


if __name__ == "__main__":
    write_data(sys.argv[1])
    write_model(Path(sys.argv[1]) / "model")
