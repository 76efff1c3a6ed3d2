import sys
from undone import case_spread

got = case_spread([9, 28, 20, 17, 9])
want = 19
if got != want:
    sys.exit(f"FAIL: got {got!r}, want {want!r}")
print("PASS")
