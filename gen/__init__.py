"""Text from models: one `Engine` protocol, its two makers (vLLM and plain torch), and the weight sync between them."""
