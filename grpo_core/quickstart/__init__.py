"""`python -m grpo_core.quickstart`: GRPO teaches arithmetic to a small model, on any machine."""
