"""Prints PASS if human_multiply is right for more arguments than the visible test's.

It is called in a process of its own, which does not hold the wanted results.
"""
import subprocess
import sys

CASES = (
    ((8, 2), 16),
    ((7, 11), 77),
    ((15, 12), 180),
    ((13, 12), 156),
    ((11, 13), 143),
    ((9, 2), 18),
)
CALLS = """
import sys
sys.path.insert(0, sys.argv[1])
from nested import human_multiply
print([human_multiply(*arguments) for arguments in eval(sys.argv[2])])
"""
arguments = repr([arguments for arguments, _ in CASES])
done = subprocess.run([sys.executable, "-c", CALLS, sys.argv[1], arguments], capture_output=True, text=True)
want = repr([result for _, result in CASES])
if done.stdout.splitlines()[-1:] != [want]:
    sys.exit(f"FAIL: got {done.stdout[-500:]} {done.stderr[-500:]}, want {want}")
print("PASS")
