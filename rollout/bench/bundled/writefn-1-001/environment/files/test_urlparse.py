import sys
from urlparse import indents_upper

got = indents_upper('weakrefs')
want = 'WEAKREFS'
if got != want:
    sys.exit(f"FAIL: got {got!r}, want {want!r}")
print("PASS")
