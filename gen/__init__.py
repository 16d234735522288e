"""Text generation: the `Engine` protocol, its two implementations (vLLM and plain torch), and weight sync."""

import sft_core  # noqa: F401 (it checks the environment before anything else is imported)
