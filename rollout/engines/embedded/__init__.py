"""The embedded engine: a small DeepSeek-V4 model decoded by our own C code, on any machine, at once.

`engine.py` is the port's implementation (batching, retained states), `binding.py` the C interface
as Python sees it, `checkpoint.py` the checked folder of weights, `*.c` the forward pass, the
sampler and the states.  Invariants 1 and 2 of `rollout/engine.py` hold bit for bit.

See: docs/architecture.md, "Engine"; docs/formats/engine_state.md.
"""
