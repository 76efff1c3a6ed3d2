"""Write generated tasks: `python -m training.curriculum OUT --count 64 --seed 1`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from training.curriculum import file_families, program_families
from training.curriculum.draw import Draw
from training.curriculum.folder import write_task
from training.curriculum.problem import Problem

FAMILIES: dict[str, Callable[[Draw], Problem]] = {
    "create": file_families.make_create,
    "append": file_families.make_append,
    "count": file_families.make_count,
    "wc": file_families.make_wc,
    "move": file_families.make_move,
    "copy": file_families.make_copy,
    "delete": file_families.make_delete,
    "replace": file_families.make_replace,
    "numbers": file_families.make_numbers,
    "sort": file_families.make_sort,
    "kth": file_families.make_kth,
    "lookup": file_families.make_lookup,
    "setcfg": file_families.make_setcfg,
    "find": file_families.make_find,
    "bug": program_families.make_bug,
    "writefn": program_families.make_writefn,
}
COUNT_MAX = 100_000
EXAMPLE = """example:
  python -m training.curriculum /tmp/tasks --count 160 --seed 7
  dsec run /tmp/tasks --out /tmp/run

The same seed gives the same tasks on every machine; task N of a family does not depend on --count
or --families."""


def make_problem(family: str, seed: int, index: int) -> Problem:
    """Draw one problem: a pure function of its arguments."""
    return FAMILIES[family](Draw(f"{seed}/{family}/{index}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tasks; the exit code is 2 for a usage error, 1 if a folder is in the way."""
    options = _parser().parse_args(argv)
    families = list(dict.fromkeys(options.families))
    for number in range(options.count):
        family, index = families[number % len(families)], number // len(families)
        name = f"{family}-{options.seed}-{index:03d}"
        problem = make_problem(family, options.seed, index)
        try:
            folder = write_task(options.out, name, family, problem)
        except OSError as why:
            print(f"{options.out / name}: {why.strerror}: choose an empty folder that can be written", file=sys.stderr)
            return 1
        if options.json:
            row = {"name": name, "family": family, "request": problem.request, "folder": str(folder)}
            print(json.dumps(row, ensure_ascii=False))
    if not options.json:
        print(f"{options.count} tasks of {len(families)} families in {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.curriculum",
        description="Write generated tasks in Harbor's format, the families in turn.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that the task folders are written to")
    parser.add_argument("--count", type=_count, default=64, help="tasks in all (default: 64)")
    parser.add_argument("--seed", type=int, default=1, help="another seed gives other names and numbers (default: 1)")
    parser.add_argument("--families", nargs="+", choices=sorted(FAMILIES), default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--json", action="store_true", help="print one JSON object a task")
    return parser


def _count(text: str) -> int:
    count = int(text)
    if not 1 <= count <= COUNT_MAX:
        raise argparse.ArgumentTypeError(f"must be 1 to {COUNT_MAX}")
    return count


if __name__ == "__main__":
    sys.exit(main())
