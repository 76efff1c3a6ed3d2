"""Calls case_spread with more arguments than the visible test; prints PASS if every result is right."""
import sys

sys.path.insert(0, sys.argv[1])
from undone import case_spread

for arguments, want in (
    (([9, 28, 20, 17, 9],), 19),
    (([11, 25, 30, 18],), 19),
    (([2, 24, 6, 11, 22],), 22),
    (([24, 12, 26, 3],), 23),
    (([15, 2, 24, 12, 1],), 23),
    (([2, 3, 3],), 1),
):
    got = case_spread(*arguments)
    if got != want or type(got) is not type(want):
        sys.exit(f"FAIL: case_spread{arguments} gave {got!r}, want {want!r}")
print("PASS")
