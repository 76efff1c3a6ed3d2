import sys
from urlsplit import indented_upper

got = indented_upper('weakrefs')
want = 'WEAKREFS'
if got != want:
    sys.exit(f"FAIL: got {got!r}, want {want!r}")
print("PASS")
