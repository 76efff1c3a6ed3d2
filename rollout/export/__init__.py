"""Exports: what trainers and other tools read instead of the log."""
