"""Compare gen.generate with distilabel 1.5.3 as open-r1 uses it, on the same server and prompts: columns, rows, time.

    python -m venv /tmp/distilabel && /tmp/distilabel/bin/pip install 'distilabel[openai]==1.5.3'
    python tests/gen/beside_distilabel.py /tmp/distilabel/bin/python gsm8k_test.jsonl \\
        [--url http://localhost:8000/v1 --model M]

Without --url both use a fake server that answers after 50 ms. The times are those of `pipeline.run`, without imports.
Start a real server with `vllm serve M --no-enable-prefix-caching`, so that the second run does not profit from the
first.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def peer(options: argparse.Namespace) -> Any:
    from distilabel.llms import OpenAILLM
    from distilabel.pipeline import Pipeline
    from distilabel.steps.tasks import TextGeneration

    with Pipeline() as pipeline:
        sampling = {"max_new_tokens": options.max_new_tokens, "temperature": 0.7}
        llm = OpenAILLM(
            base_url=options.url,
            api_key="something",
            model=options.model,
            timeout=900,
            max_retries=0,
            generation_kwargs=sampling,
        )
        TextGeneration(
            llm=llm,
            template="{{ instruction }}",
            input_mappings={"instruction": "prompt"},
            input_batch_size=64,
            num_generations=options.n,
            group_generations=True,
        )
    return pipeline


def ours(options: argparse.Namespace) -> Any:
    from gen.generate import build_distilabel_pipeline

    return build_distilabel_pipeline(
        options.model,
        options.url,
        "prompt",
        temperature=0.7,
        num_generations=options.n,
        max_new_tokens=options.max_new_tokens,
    )


def run(name: str, options: argparse.Namespace) -> None:
    from datasets import Dataset

    lines = Path(options.data).read_text().splitlines()[: options.rows]
    rows = [{"prompt": json.loads(line)["question"], "id": i} for i, line in enumerate(lines)]
    pipeline = {"peer": peer, "ours": ours}[name](options)
    start = time.perf_counter()
    found = pipeline.run(dataset=Dataset.from_list(rows), dataset_batch_size=64_000, use_cache=False)["default"][
        "train"
    ]
    seconds = time.perf_counter() - start
    count = sum(len(row["generation"]) for row in found)
    columns = ", ".join(sorted(found.column_names))
    print(f"RESULT {name}: {len(found)} rows, {count} generations, {seconds:.2f} s; {columns}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("python", help="of distilabel's environment")
    parser.add_argument("data", help="JSON lines with `question`")
    parser.add_argument("--url")
    parser.add_argument("--model", default="served")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--n", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=8)
    parser.add_argument("--only", choices=["peer", "ours"])
    options = parser.parse_args()
    if options.only:
        return run(options.only, options)
    server = None
    if options.url is None:
        options.url = "http://127.0.0.1:8977/v1"
        server = subprocess.Popen([sys.executable, "-m", "tests.fake_openai", "8977", "0.05"], cwd=ROOT)
        time.sleep(2)
    try:
        for name in ("peer", "ours") * 2:
            python = options.python if name == "peer" else sys.executable
            told = [options.data, "--url", options.url, "--model", options.model, "--rows", str(options.rows)]
            told += ["--n", str(options.n), "--max_new_tokens", str(options.max_new_tokens), "--only", name]
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            command = [python, __file__, python, *told]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            print(*[line for line in done.stdout.splitlines() if line.startswith("RESULT")] or [done.stderr[-2000:]])
    finally:
        if server is not None:
            server.kill()


if __name__ == "__main__":
    main()
