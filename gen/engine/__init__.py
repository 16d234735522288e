"""Sampling engines: the `Engine` protocol, its vLLM and plain torch implementations, and the weight sync."""
