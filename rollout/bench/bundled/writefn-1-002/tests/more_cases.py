"""Calls plus_bogus with more arguments than the visible test; prints PASS if every result is right."""
import sys

sys.path.insert(0, sys.argv[1])
from buggy import plus_bogus

for arguments, want in (
    ((7, 5), 12),
    ((8, 15), 23),
    ((14, 2), 16),
    ((12, 12), 24),
    ((14, 6), 20),
    ((6, 15), 21),
):
    got = plus_bogus(*arguments)
    if got != want or type(got) is not type(want):
        sys.exit(f"FAIL: plus_bogus{arguments} gave {got!r}, want {want!r}")
print("PASS")
