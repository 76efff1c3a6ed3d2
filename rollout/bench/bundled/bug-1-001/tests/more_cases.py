"""Calls https_multiply with more arguments than the visible test; prints PASS if every result is right."""
import sys

sys.path.insert(0, sys.argv[1])
from nested import https_multiply

for arguments, want in (
    ((8, 2), 16),
    ((7, 11), 77),
    ((15, 12), 180),
    ((13, 12), 156),
    ((11, 13), 143),
    ((9, 2), 18),
):
    got = https_multiply(*arguments)
    if got != want or type(got) is not type(want):
        sys.exit(f"FAIL: https_multiply{arguments} gave {got!r}, want {want!r}")
print("PASS")
