import sys
from represent import pipe_reverse_text

got = pipe_reverse_text('unlock')
want = 'kcolnu'
if got != want:
    sys.exit(f"FAIL: got {got!r}, want {want!r}")
print("PASS")
