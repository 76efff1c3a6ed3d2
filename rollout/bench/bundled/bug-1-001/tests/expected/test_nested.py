import sys
from nested import human_multiply

got = human_multiply(8, 2)
want = 16
if got != want:
    sys.exit(f"FAIL: got {got!r}, want {want!r}")
print("PASS")
