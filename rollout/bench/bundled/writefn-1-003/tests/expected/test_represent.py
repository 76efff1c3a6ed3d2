import sys
from represent import placed_reverse_text

got = placed_reverse_text('unpack')
want = 'kcapnu'
if got != want:
    sys.exit(f"FAIL: got {got!r}, want {want!r}")
print("PASS")
