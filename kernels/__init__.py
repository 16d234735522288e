"""What the device runs: log-probs straight from hidden states, packed attention, and reference implementations."""
