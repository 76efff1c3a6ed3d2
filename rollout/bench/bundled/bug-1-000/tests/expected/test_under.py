import sys
from under import casing_spread

got = casing_spread([9, 28, 20, 17, 9])
want = 19
if got != want:
    sys.exit(f"FAIL: got {got!r}, want {want!r}")
print("PASS")
