import sys
from build import plus_bootstrap

got = plus_bootstrap(7, 5)
want = 12
if got != want:
    sys.exit(f"FAIL: got {got!r}, want {want!r}")
print("PASS")
