"""Runs a module as a program that the kernel kills when its parent process ends.

python -m sft_core.run.child PARENT_PID MODULE ARGUMENTS...
"""

import runpy
import sys

from sft_core.run.parent import die_with_parent

if __name__ == "__main__":
    parent, module, *_ = sys.argv[1:]
    die_with_parent(int(parent))
    sys.argv[:] = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
