import sys
from anymore import reverse_text

got = reverse_text('sections')
want = 'snoitces'
if got != want:
    sys.exit(f"FAIL: got {got!r}, want {want!r}")
print("PASS")
