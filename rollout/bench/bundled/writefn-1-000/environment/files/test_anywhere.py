import sys
from anywhere import reverse_text

got = reverse_text('secure')
want = 'eruces'
if got != want:
    sys.exit(f"FAIL: got {got!r}, want {want!r}")
print("PASS")
