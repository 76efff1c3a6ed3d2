import sys
from bits import multiply

got = multiply(2, 12)
want = 24
if got != want:
    sys.exit(f"FAIL: got {got!r}, want {want!r}")
print("PASS")
