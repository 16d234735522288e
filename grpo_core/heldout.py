"""How many held-out problems each of several models solves: greedy, and pass@1 at temperature 1.

One engine samples for all models and takes their weights in turn, so they must be of one architecture and share a
tokenizer. `grpo_core/comparison.py` calls this in a process of its own. For benchmarks, chat templates of several
models and files that a page can show: `python -m eval.run`.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sft_core.data.rows import load_rows
from sft_core.run.files import write_atomically
from sft_core.run.options import require

MODES = {"greedy": 0.0, "pass@1": 1.0}  # temperatures


def problems(file: str) -> list[dict[str, str]]:
    """`prompt` and `solution` of each row. ValueError: a row without one of them, or fewer than two rows."""
    rows = []
    for number, row in enumerate(load_rows(file, option="--heldout"), 1):
        problem, solution = (row.get(a) or row.get(b) for a, b in (("problem", "prompt"), ("solution", "answer")))
        require(problem and solution, f"{file}: row {number} needs `problem` and `solution`, it has {', '.join(row)}.")
        rows.append({"prompt": str(problem).strip(), "solution": str(solution)})
    require(len(rows) > 1, f"{file} needs two problems or more, it has {len(rows)}.")
    return rows


def evaluate(models: list[Path], file: str, length: int, engine: str, samples: int, dtype: str) -> None:
    """Write NAME-heldout.json beside each model's folder NAME: for each mode one share of right answers per problem.

    file: of problems. length: tokens that an answer may have. samples: of each problem, for pass@1.
    """
    from safetensors.torch import load_file

    from eval.workers import WorkerPool
    from gen.config import TextSampling
    from gen.engine.base import EngineConfig
    from gen.sampler import EngineSampler
    from grpo_core.rewards import accuracy_reward
    from grpo_core.scoring import ToScore, start_scoring

    rows = problems(file)
    sampler = EngineSampler(engine, str(models[0]))
    prompts = [sampler.encode([{"role": "user", "content": row["prompt"]}]) for row in rows]
    context = max(map(len, prompts)) + length
    sampler.start(EngineConfig(str(models[0]), max_model_len=context, max_batch=512, dtype=dtype))
    assert sampler.engine is not None
    pool = WorkerPool(2)
    for version, model in enumerate(tqdm(models, desc="evaluate", disable=None)):
        sampler.engine.load_weights(load_file(model / "model.safetensors").items(), version)
        result = {}
        for mode, temperature in MODES.items():
            n = samples if temperature else 1
            sampling = TextSampling(n, length, temperature, seed=0)
            to_score = []
            for group, answers in enumerate(sampler.sample(prompts, range(len(prompts)), sampling)):
                row = rows[group]
                columns = {"solution": row["solution"]}
                to_score += [ToScore(a.text, list(a.token_ids), group, row["prompt"], "", columns) for a in answers]
            scores = start_scoring([accuracy_reward], None, to_score, pool)().rewards
            result[mode] = np.nan_to_num(scores).reshape(len(rows), n).mean(axis=1).tolist()
        write_atomically(result_file(model), json.dumps(result))
    pool.close()
    sampler.close()


def result_file(model: Path) -> Path:
    return model.with_name(f"{model.name}-heldout.json")


def read(model: Path) -> dict[str, list[float]]:
    return json.loads(result_file(model).read_text())


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (normal, over problems), both in percent.

    Of one share per problem; or of the difference of two models' shares, which makes the comparison a paired one.
    """
    return 100 * float(np.mean(values)), 100 * 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def difference(a: Path, b: Path, mode: str) -> tuple[float, float]:
    """B's share less A's: mean over problems and half the width of its 95 % interval, in percent."""
    before, after = read(a)[mode], read(b)[mode]
    return interval([y - x for x, y in zip(before, after, strict=True)])


if __name__ == "__main__":
    evaluate([Path(model) for model in sys.argv[2:]], **json.loads(sys.argv[1]))
