"""Prints PASS if double_all is right for more arguments than the visible test's.

It is called in a process of its own, which does not hold the wanted results.
"""
import subprocess
import sys

CASES = (
    (([23, 18, 3],), [46, 36, 6]),
    (([26, 16, 3],), [52, 32, 6]),
    (([3, 24, 17],), [6, 48, 34]),
    (([15, 1, 6, 24, 4],), [30, 2, 12, 48, 8]),
    (([14, 16, 7],), [28, 32, 14]),
    (([10, 1, 26, 19, 8],), [20, 2, 52, 38, 16]),
)
CALLS = """
import sys
sys.path.insert(0, sys.argv[1])
from div import double_all
print([double_all(*arguments) for arguments in eval(sys.argv[2])])
"""
arguments = repr([arguments for arguments, _ in CASES])
done = subprocess.run([sys.executable, "-c", CALLS, sys.argv[1], arguments], capture_output=True, text=True)
want = repr([result for _, result in CASES])
if done.stdout.splitlines()[-1:] != [want]:
    sys.exit(f"FAIL: got {done.stdout[-500:]} {done.stderr[-500:]}, want {want}")
print("PASS")
