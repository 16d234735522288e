"""What a run says of itself before it starts, as open-r1's scripts do: verbosity, processes, parameters."""

import logging
from typing import Any

import transformers

from sft_core.run.config import TrainingConfig

logger = logging.getLogger(__name__)


def start_logging() -> None:
    """Warnings and worse to stderr, with time and place, from the first word on."""
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=logging.WARNING,
    )


def set_log_level(config: TrainingConfig) -> None:
    """`log_level` for this program, datasets and transformers; `passive` leaves them as they are."""
    import datasets  # not needed where no rows are read

    if config.log_level == "passive":
        return
    level = getattr(logging, config.log_level.upper())
    for package in ("sft_core", "gen", "eval", "grpo_core"):
        logging.getLogger(package).setLevel(level)
    datasets.utils.logging.set_verbosity(level)
    datasets.utils.logging.disable_propagation()  # it has a handler of its own
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_default_handler()


def announce(run: Any) -> None:
    """A warning line per process, the parameters once, what is done otherwise than the recipe may expect, the plan.

    `run`: `sft_core.prepare.Base` with `config` and `summary`.
    """
    logger.warning(
        "Process rank: %d of %d, device: %s, computing in %s, masters in float32",
        run.rank,
        run.world_size,
        run.device,
        "bfloat16" if run.bf16 else "float32",
    )
    if run.rank != 0:
        return
    model, config = run.model, run.config
    logger.info("Model parameters %s", model)
    logger.info("Script parameters %s", run.data)
    logger.info("Training parameters %s", config)
    if model.attn_implementation in ("eager", "sdpa"):
        logger.warning("attn_implementation %s: attention here is always the packed one.", model.attn_implementation)
    if config.optim not in ("adamw_torch", "adamw_torch_fused"):
        logger.warning("optim %s: AdamW with float32 moments, sharded over the ranks, takes its place.", config.optim)
    if getattr(config, "vllm_mode", "colocate") == "server":
        logger.warning("vllm_mode server: the engine lives in the ranks themselves (colocate); no server is used.")
    print(run.summary)
    if run.checkpoint is not None:
        print(f"goes on from {run.checkpoint}")
