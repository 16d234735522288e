"""Evaluation: answer checking, tasks, metrics, the runner. Imports next to nothing: a checking worker stays light."""

import sft_core  # noqa: F401 (what it refuses is said before anything else is imported)
