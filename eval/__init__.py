"""Evaluation: answer checking, tasks, metrics, and the runner. It imports little, to keep checking workers small."""

import sft_core  # noqa: F401 (it checks the environment before anything else is imported)
