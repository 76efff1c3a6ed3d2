import sys
from buggy import plus_bogus

got = plus_bogus(7, 5)
want = 12
if got != want:
    sys.exit(f"FAIL: got {got!r}, want {want!r}")
print("PASS")
