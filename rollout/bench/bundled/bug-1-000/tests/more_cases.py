"""Prints PASS if casing_spread is right for more arguments than the visible test's.

It is called in a process of its own, which does not hold the wanted results.
"""
import subprocess
import sys

CASES = (
    (([9, 28, 20, 17, 9],), 19),
    (([11, 25, 30, 18],), 19),
    (([2, 24, 6, 11, 22],), 22),
    (([24, 12, 26, 3],), 23),
    (([15, 2, 24, 12, 1],), 23),
    (([2, 3, 3],), 1),
)
CALLS = """
import sys
sys.path.insert(0, sys.argv[1])
from under import casing_spread
print([casing_spread(*arguments) for arguments in eval(sys.argv[2])])
"""
arguments = repr([arguments for arguments, _ in CASES])
done = subprocess.run([sys.executable, "-c", CALLS, sys.argv[1], arguments], capture_output=True, text=True)
want = repr([result for _, result in CASES])
if done.stdout.splitlines()[-1:] != [want]:
    sys.exit(f"FAIL: got {done.stdout[-500:]} {done.stderr[-500:]}, want {want}")
print("PASS")
