"""Engines that sample: the `Engine` protocol, vLLM and plain torch, and the weight sync into them."""
