"""Text from models: one `Engine` protocol, its two makers (vLLM and plain torch), and the weight sync between them."""

import sft_core  # noqa: F401 (what it refuses is said before anything else is imported)
