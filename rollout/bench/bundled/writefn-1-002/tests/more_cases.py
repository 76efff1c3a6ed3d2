"""Prints PASS if plus_bootstrap is right for more arguments than the visible test's.

It is called in a process of its own, which does not hold the wanted results.
"""
import subprocess
import sys

CASES = (
    ((7, 5), 12),
    ((8, 15), 23),
    ((14, 2), 16),
    ((12, 12), 24),
    ((14, 6), 20),
    ((6, 15), 21),
)
CALLS = """
import sys
sys.path.insert(0, sys.argv[1])
from build import plus_bootstrap
print([plus_bootstrap(*arguments) for arguments in eval(sys.argv[2])])
"""
arguments = repr([arguments for arguments, _ in CASES])
done = subprocess.run([sys.executable, "-c", CALLS, sys.argv[1], arguments], capture_output=True, text=True)
want = repr([result for _, result in CASES])
if done.stdout.splitlines()[-1:] != [want]:
    sys.exit(f"FAIL: got {done.stdout[-500:]} {done.stderr[-500:]}, want {want}")
print("PASS")
