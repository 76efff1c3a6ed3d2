"""What every engine behind `rollout/engine.py` does alike, as named checks that run against any `Engine`."""
