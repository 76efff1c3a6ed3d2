"""vLLM as an engine: its wire, its servers, and a tiny model to try it with."""
