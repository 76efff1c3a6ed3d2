"""Calls multiply with more arguments than the visible test; prints PASS if every result is right."""
import sys

sys.path.insert(0, sys.argv[1])
from bindings import multiply

for arguments, want in (
    ((2, 12), 24),
    ((13, 6), 78),
    ((3, 9), 27),
    ((14, 11), 154),
    ((1, 12), 12),
    ((5, 14), 70),
):
    got = multiply(*arguments)
    if got != want or type(got) is not type(want):
        sys.exit(f"FAIL: multiply{arguments} gave {got!r}, want {want!r}")
print("PASS")
