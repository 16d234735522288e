"""Evaluation: answer checking, tasks, metrics, the runner. Imports nothing, so that a checking worker stays light."""
