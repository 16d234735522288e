"""GRPO: group sampling, rewards, advantages, the objective, the loop."""
