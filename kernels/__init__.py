"""What the device runs: log-probs straight from hidden states, attention over packed rows, and their plain twins."""
