"""Prints PASS if indents_upper is right for more arguments than the visible test's.

It is called in a process of its own, which does not hold the wanted results.
"""
import subprocess
import sys

CASES = (
    (('weakrefs',), 'WEAKREFS'),
    (('trans',), 'TRANS'),
    (('ignorable',), 'IGNORABLE'),
    (('nonzero',), 'NONZERO'),
    (('intervals',), 'INTERVALS'),
    (('tells',), 'TELLS'),
)
CALLS = """
import sys
sys.path.insert(0, sys.argv[1])
from urlparse import indents_upper
print([indents_upper(*arguments) for arguments in eval(sys.argv[2])])
"""
arguments = repr([arguments for arguments, _ in CASES])
done = subprocess.run([sys.executable, "-c", CALLS, sys.argv[1], arguments], capture_output=True, text=True)
want = repr([result for _, result in CASES])
if done.stdout.splitlines()[-1:] != [want]:
    sys.exit(f"FAIL: got {done.stdout[-500:]} {done.stderr[-500:]}, want {want}")
print("PASS")
