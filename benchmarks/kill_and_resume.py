"""Kill a run at random moments, sandboxes included, resume it, and compare with a run that was never killed.

For each kill: `dsec run` is started, its whole process tree is stopped and killed with SIGKILL at a
random moment, and `dsec run --resume` finishes it.  The final token ids of every rollout must equal
the reference's; tokens sampled again, commands applied twice and leftovers are counted and must be 0.
The seed is printed; a run can be repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

DSEC = str(Path(sys.executable).parent / "dsec")
EXAMPLE = "example: python benchmarks/kill_and_resume.py --kills 20 --temperature 1 --json"


def tree_of(root: int) -> set[int]:
    """A process and all its descendants, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry))
    found, todo = set(), [root]
    while todo:
        pid = todo.pop()
        found.add(pid)
        todo += children.get(pid, [])
    return found


def kill_tree(root: int) -> None:
    """Stop every process of the tree, so that none can react, then SIGKILL them all."""
    stopped: set[int] = set()
    while new := tree_of(root) - stopped:
        for pid in new:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        stopped |= new
    for pid in stopped:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def leftovers_of(pid: int) -> list[str]:
    """Cgroups that carry the owner's pid, and mounts of ours that the host can see."""
    groups = [str(path) for path in Path("/sys/fs/cgroup").rglob(f"dsec-*-{pid}-*") if path.is_dir()]
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if "dsec" in line.split()[1]]
    return groups + mounts


def token_ids(directory: Path) -> dict[str, list[int]]:
    """Rollout id -> its final token ids, through `dsec show --json`."""
    shown = subprocess.run([DSEC, "show", str(directory), "--json"], capture_output=True, check=True).stdout
    return {record["rollout_id"]: record["token_ids"] for record in map(json.loads, shown.splitlines())}


def run(arguments: list[str], directory: Path) -> dict[str, object]:
    """`dsec run --resume` to its end; the summary."""
    command = [DSEC, "run", *arguments, "--resume", "--out", str(directory), "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode not in (0, 1) or not ran.stdout:
        raise SystemExit(f"{' '.join(command)} ended with {ran.returncode}: {ran.stderr}")
    summary: dict[str, object] = json.loads(ran.stdout)
    return summary


def kill_once(arguments: list[str], directory: Path, after_s: float) -> tuple[dict[str, object], list[str]]:
    """Start, kill after so many seconds, resume; the summary, and what was left of the killed run."""
    process = subprocess.Popen(
        [DSEC, "run", *arguments, "--out", str(directory), "--json"],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(after_s)
    kill_tree(process.pid)
    process.wait()
    return run(arguments, directory), leftovers_of(process.pid)


def main() -> int:
    """Run the kills; exit 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--tasks", help="tasks folder [default: the bundled tasks]")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--group-size", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the sampling")
    parser.add_argument("--quick", action="store_true", help="three kills")
    parser.add_argument("--json", action="store_true", help="one JSON object, nothing else")
    options = parser.parse_args()
    arguments = [*([options.tasks] if options.tasks else []), "--seed", str(options.seed)]
    arguments += ["--temperature", str(options.temperature), "--group-size", str(options.group_size)]
    root, rows = Path(tempfile.mkdtemp(prefix="dsec-kills-")), list[dict[str, object]]()
    moments = random.Random(options.seed)  # noqa: S311 - moments, not secrets
    try:
        began = time.monotonic()
        run(arguments, root / "reference")
        whole_s, reference = time.monotonic() - began, token_ids(root / "reference")
        for number in range(3 if options.quick else options.kills):
            after_s = moments.uniform(0.2, whole_s)
            directory = root / str(number)
            summary, left = kill_once(arguments, directory, after_s)
            row = {"after_s": round(after_s, 2), "is_equal": token_ids(directory) == reference, "left": left}
            row |= {key: summary[key] for key in ("tokens_regenerated", "commands_run_twice", "infra_failures")}
            row |= {key: summary[key] for key in ("tokens_replayed", "commands_replayed", "resumes")}
            rows.append(row)
            if not options.json:
                print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            shutil.rmtree(directory)
    finally:
        shutil.rmtree(root)
    must_be_0 = ("tokens_regenerated", "commands_run_twice", "infra_failures")
    good = sum(row["is_equal"] and not row["left"] and not any(row[key] for key in must_be_0) for row in rows)
    figures = {"kills": len(rows), "good": good, "rollouts": len(reference), "whole_s": round(whole_s, 2)}
    print(json.dumps({"figures": figures, "rows": rows}) if options.json else f"{good} of {len(rows)} good  {figures}")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
