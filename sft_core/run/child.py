"""A module run as a program that ends with the process that started it: the kernel kills it when that one is gone.

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
