"""Check whether `eval.run` accepts these options: their names and values, the tasks and the engine. It loads nothing.

    python -m eval.check --model MODEL --tasks math_500 --output_dir out ...

If not, it prints one line and exits with code 2. A trainer runs this check before it trains for hours.
"""

import sys

from eval.config import EvalConfig
from eval.tasks import find_tasks, load_custom_tasks
from gen.engine.base import check_engine_available
from sft_core.run.cli import parse
from sft_core.run.distributed import usage_errors


def main(argv: list[str] | None = None) -> None:
    with usage_errors():
        (config,) = parse((EvalConfig,), sys.argv[1:] if argv is None else argv)
        if not config.base_url:
            check_engine_available(config.engine)
        find_tasks(config.tasks, load_custom_tasks(config.custom_tasks) if config.custom_tasks else ())


if __name__ == "__main__":
    main()
