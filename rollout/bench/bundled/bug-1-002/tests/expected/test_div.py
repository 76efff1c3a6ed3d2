import sys
from div import double_all

got = double_all([23, 18, 3])
want = [46, 36, 6]
if got != want:
    sys.exit(f"FAIL: got {got!r}, want {want!r}")
print("PASS")
