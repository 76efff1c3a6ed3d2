"""Engines behind the port of `rollout/engine.py`.

Each one is a module or package of its own, so that its dependencies load only where it is used.
"""
