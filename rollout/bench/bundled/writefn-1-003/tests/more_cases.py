"""Calls placed_reverse_text with more arguments than the visible test; prints PASS if every result is right."""
import sys

sys.path.insert(0, sys.argv[1])
from represent import placed_reverse_text

for arguments, want in (
    (('unpack',), 'kcapnu'),
    (('outside',), 'edistuo'),
    (('locations',), 'snoitacol'),
    (('comment',), 'tnemmoc'),
    (('adapted',), 'detpada'),
    (('largest',), 'tsegral'),
):
    got = placed_reverse_text(*arguments)
    if got != want or type(got) is not type(want):
        sys.exit(f"FAIL: placed_reverse_text{arguments} gave {got!r}, want {want!r}")
print("PASS")
