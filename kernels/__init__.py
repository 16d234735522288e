"""Device code: log-probs computed from hidden states, packed attention, and their reference implementations."""
