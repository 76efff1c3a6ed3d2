"""Calls double_all with more arguments than the visible test; prints PASS if every result is right."""
import sys

sys.path.insert(0, sys.argv[1])
from division import double_all

for arguments, want in (
    (([23, 18, 3],), [46, 36, 6]),
    (([26, 16, 3],), [52, 32, 6]),
    (([3, 24, 17],), [6, 48, 34]),
    (([15, 1, 6, 24, 4],), [30, 2, 12, 48, 8]),
    (([14, 16, 7],), [28, 32, 14]),
    (([10, 1, 26, 19, 8],), [20, 2, 52, 38, 16]),
):
    got = double_all(*arguments)
    if got != want or type(got) is not type(want):
        sys.exit(f"FAIL: double_all{arguments} gave {got!r}, want {want!r}")
print("PASS")
