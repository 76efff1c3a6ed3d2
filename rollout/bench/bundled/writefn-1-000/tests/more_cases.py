"""Prints PASS if reverse_text is right for more arguments than the visible test's.

It is called in a process of its own, which does not hold the wanted results.
"""
import subprocess
import sys

CASES = (
    (('secure',), 'eruces'),
    (('idle',), 'eldi'),
    (('wishes',), 'sehsiw'),
    (('cwd',), 'dwc'),
    (('post',), 'tsop'),
    (('padded',), 'deddap'),
)
CALLS = """
import sys
sys.path.insert(0, sys.argv[1])
from anywhere import reverse_text
print([reverse_text(*arguments) for arguments in eval(sys.argv[2])])
"""
arguments = repr([arguments for arguments, _ in CASES])
done = subprocess.run([sys.executable, "-c", CALLS, sys.argv[1], arguments], capture_output=True, text=True)
want = repr([result for _, result in CASES])
if done.stdout.splitlines()[-1:] != [want]:
    sys.exit(f"FAIL: got {done.stdout[-500:]} {done.stderr[-500:]}, want {want}")
print("PASS")
