"""The task of `make quickstart`: arithmetic word problems made by a seeded program, and a small decoder to learn them.

A problem is about two numbers from 10 to 99 that have to be added (to less than 100) or subtracted. A demonstration
writes the sum down, works the ones and then the tens, and ends in the answer. A few hundred of them teach the manner,
and show each of the two hundred single-digit facts only a few times: further supervised training soon has nothing more
to give, and the facts the model gets wrong are what is left for GRPO to find from answers alone.

Splits share no sum: neither the same two numbers under the same operation, nor the same addition turned round.
Left out on purpose: more steps, other operations, prose in the working. Run it:

    python -m grpo_core.quickstart_task FOLDER     # FOLDER/model, demonstrations.jsonl, train.jsonl, heldout.jsonl
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

    @property
    def key(self) -> tuple[str, int, int]:
        """What two splits must not share; an addition and its mirror image have one key."""
        return (self.operation, *sorted((self.a, self.b)))


def write_problem(rng: random.Random, operation: str, a: int, b: int) -> Problem:
    name, other = rng.sample(NAMES, 2)
    template = rng.choice(TEMPLATES[operation])
    return Problem(a, b, operation, template.format(a=a, b=b, name=name, other=other, things=rng.choice(OBJECTS)))


def columns(problem: Problem) -> list[str]:
    """Ones, then tens with what was carried or borrowed: 47+38 is ["7+8=15", "5+3=8"], 63-28 ["13-8=5", "5-2=3"]."""
    (a_tens, a_ones), (b_tens, b_ones) = divmod(problem.a, 10), divmod(problem.b, 10)
    if problem.operation == "+":
        a_tens += a_ones + b_ones > 9
        return [f"{a_ones}+{b_ones}={a_ones + b_ones}", f"{a_tens}+{b_tens}={a_tens + b_tens}"]
    if a_ones < b_ones:
        a_tens, a_ones = a_tens - 1, a_ones + 10
    return [f"{a_ones}-{b_ones}={a_ones - b_ones}", f"{a_tens}-{b_tens}={a_tens - b_tens}"]


def write_demonstration(problem: Problem) -> str:
    working = "\n".join([f" {problem.a}{problem.operation} {problem.b}", *columns(problem)])
    return f"<think>{working}</think><answer>{problem.answer}</answer>"


def make_splits(seed: int, sizes: dict[str, int], carrying: bool = True) -> dict[str, list[Problem]]:
    """Problems for every split of `sizes`, no key twice, additions and subtractions half and half on average.

    Without `carrying` no column carries or borrows: half the facts to learn; 2,000 problems exist, not 3,280.
    """
    rng = random.Random(seed)
    additions = [("+", a, b) for a in range(10, 90) for b in range(10, min(a, 99 - a) + 1)]
    subtractions = [("-", a, b) for a in range(10, 100) for b in range(10, a)]
    if not carrying:
        additions = [key for key in additions if key[1] % 10 + key[2] % 10 < 10]
        subtractions = [key for key in subtractions if key[1] % 10 >= key[2] % 10]
    keys = additions + rng.sample(subtractions, len(additions))
    if sum(sizes.values()) > len(keys):
        raise ValueError(f"{sum(sizes.values())} problems asked for, {len(keys)} exist: ask for fewer")
    rng.shuffle(keys)
    splits = {}
    for split, size in sizes.items():
        taken, keys = keys[:size], keys[size:]
        turned = [(op, *((b, a) if op == "+" and rng.random() < 0.5 else (a, b))) for op, a, b in taken]
        splits[split] = [write_problem(rng, op, a, b) for op, a, b in turned]
    return splits


def write_data(
    folder: str | Path,
    seed: int = 0,
    demonstrations: int = 500,
    train: int = 2200,
    heldout: int = 500,
    carrying: bool = True,
) -> dict[str, Path]:
    """Write demonstrations.jsonl ({"messages"}), train.jsonl and heldout.jsonl ({"prompt", "solution"})."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    splits = make_splits(seed, {"heldout": heldout, "demonstrations": demonstrations, "train": train}, carrying)
    shown = [
        {
            "messages": [
                {"role": "user", "content": p.text},
                {"role": "assistant", "content": write_demonstration(p)},
            ]
        }
        for p in splits["demonstrations"]
    ]
    asked = {
        split: [{"prompt": p.text, "solution": str(p.answer)} for p in splits[split]] for split in ("train", "heldout")
    }
    paths = {}
    for split, rows in {"demonstrations": shown, **asked}.items():
        paths[split] = folder / f"{split}.jsonl"
        paths[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def make_tokenizer():
    """Byte-level BPE in which every word of the task is one token and so is every digit; any text round-trips."""
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
    """Write a randomly initialised Llama of 1.4 million parameters, and its tokenizer, as a Hugging Face folder."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=6,  # heads of 32: the smallest that vLLM takes on the CPU
        num_key_value_heads=6,
        initializer_range=0.06,  # 0.02 suits wider models; here it doubles the steps until the model copies numbers
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
