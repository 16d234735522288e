"""A run that fails leaves nothing armed, locked or running in its process."""

import faulthandler
import importlib
import os
import signal

import psutil
import pytest
import torch.distributed as dist

from sft_core.run.distributed import lock_output_dir
from tests.grpo_core.test_train import options
from tests.launch import flags
from tests.processes import run_ranks


def left_behind(module, argv, folder):
    """What remains in the process after a step has raised."""
    limits = []
    arm, disarm = faulthandler.dump_traceback_later, faulthandler.cancel_dump_traceback_later
    faulthandler.dump_traceback_later = lambda seconds, **more: (limits.append(seconds), arm(seconds, **more))
    faulthandler.cancel_dump_traceback_later = lambda: (limits.append(0), disarm())

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in its background jobs

    def fail(*arguments):
        limits.append("the step")
        raise RuntimeError("no step today")

    trainer = importlib.import_module(module)
    trainer.step_counts = fail
    with pytest.raises(RuntimeError, match="no step today"):
        trainer.main(argv)
    lock_output_dir(folder, wait_s=0)
    return {
        "limits": limits,
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)],
        "process group": dist.is_initialized() or "RANK" in os.environ,
        "workers": [process.cmdline() for process in psutil.Process().children() if "eval" in str(process.cmdline())],
    }


@pytest.mark.parametrize("module", ["sft_core.train", "grpo_core.train"])
def test_an_exception_in_a_step_leaves_nothing_behind(tiny_model, rows, problems, tmp_path, module):
    if module == "sft_core.train":
        argv = flags(model_name_or_path=tiny_model, dataset_name=rows, output_dir=tmp_path, report_to=["none"])
    else:
        argv = options(tiny_model, problems, tmp_path)
    [left] = run_ranks(1, left_behind, module, argv, tmp_path)
    limits = left.pop("limits")
    assert limits[limits.index("the step") - 1] > 0 and limits[-1] == 0  # armed during the step only
    signals = [signal.SIG_DFL, signal.default_int_handler]
    assert left == {"signals": signals, "process group": False, "workers": []}
