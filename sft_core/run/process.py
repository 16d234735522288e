"""Attributes of transformers' TrainingArguments that describe the process: `args.local_rank`, `args.device`, and so on.

They read torchrun's environment variables on access, and only then import torch and transformers.
"""

import logging
import os
from typing import Any


class OfTheProcess:
    log_level: str

    @property
    def local_rank(self) -> int:
        """The rank on this machine; -1 in a process that no launcher started."""
        return int(os.environ.get("LOCAL_RANK", -1))

    @property
    def process_index(self) -> int:
        return int(os.environ.get("RANK", 0))

    @property
    def world_size(self) -> int:
        return int(os.environ.get("WORLD_SIZE", 1))

    @property
    def n_gpu(self) -> int:
        """The number of GPUs of this process, at most one."""
        return int(self.device.type == "cuda")

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cuda", max(0, self.local_rank)) if torch.cuda.is_available() else torch.device("cpu")

    def get_process_log_level(self) -> int:
        """`log_level` as a number of `logging`; passive: transformers' current level."""
        if self.log_level != "passive":
            return getattr(logging, self.log_level.upper())
        import transformers

        return transformers.utils.logging.get_verbosity()
