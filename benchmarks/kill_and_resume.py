"""Kill a run at random moments, resume it, and compare with a run that was never killed.

Two kinds of kill.  `run`: SIGKILL for `dsec run` alone, so that its sandboxes live on and are taken up; nothing is
replayed.  `tree`: its whole process tree is stopped and killed, sandboxes, spawner and keeper included, so that they
are rebuilt.  `dsec run --resume` finishes it.  The final token ids of every rollout must equal the reference's;
tokens sampled again, commands applied twice and leftovers (cgroups, mounts, processes) are counted and must be 0.
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

from dsec.edge.config import NATIVE_BINARY, SubstrateConfig
from dsec.edge.linux import cgroup

BINARY = "dsec-sandbox"
KINDS = ("run", "tree")
MUST_BE_0 = ("tokens_regenerated", "commands_run_twice", "infra_failures")
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


def leftovers_of(root: Path) -> list[str]:
    """Cgroups without an owner, mounts of ours that the host can see, and keepers and spawners of runs below `root`."""
    places = cgroup.parents(cgroup.detect(), SubstrateConfig().cgroup_parent)
    groups = [str(path) for place in places for path in place.glob("dsec-*") if cgroup.is_leftover(path.name)]
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if str(root) in line.split()[1]]
    return groups + mounts + processes_of(root / BINARY)


def processes_of(binary: Path) -> list[str]:
    """Command lines of what runs this very binary."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = entry.read_bytes().decode(errors="replace").split("\0")
            found += [" ".join(words)] if words[0] == str(binary) else []
    return found


def token_ids(directory: Path) -> dict[str, list[int]]:
    """Rollout id -> its final token ids, through `dsec show --json`."""
    shown = subprocess.run([DSEC, "show", str(directory), "--json"], capture_output=True, check=True).stdout
    return {record["rollout_id"]: record["token_ids"] for record in map(json.loads, shown.splitlines())}


def dsec_run(arguments: list[str], directory: Path) -> subprocess.Popen[str]:
    """`dsec run` on the directory, with a native binary that is its root's own."""
    env = {**os.environ, "DSEC_EDGE_BINARY_PATH": str(directory.parent / BINARY)}
    command = [DSEC, "run", *arguments, "--resume", "--out", str(directory), "--json"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def finish(arguments: list[str], directory: Path) -> dict[str, object]:
    """`dsec run --resume` to its end; the summary."""
    process = dsec_run(arguments, directory)
    out, err = process.communicate()
    if process.returncode not in (0, 1) or not out:
        raise SystemExit(f"dsec run on {directory} ended with {process.returncode}: {err}")
    summary: dict[str, object] = json.loads(out)
    return summary


def kill_once(kind: str, arguments: list[str], directory: Path, after_s: float) -> dict[str, object]:
    """Start, kill after so many seconds, resume; the row."""
    process = dsec_run(arguments, directory)
    time.sleep(after_s)
    kill_tree(process.pid) if kind == "tree" else process.kill()
    process.communicate()
    summary = finish(arguments, directory)
    row = {"kind": kind, "after_s": round(after_s, 2), "left": leftovers_of(directory.parent)}
    return row | {key: summary[key] for key in (*MUST_BE_0, "tokens_replayed", "commands_replayed", "resumes")}


def is_good(row: dict[str, object]) -> bool:
    """Whether nothing was lost, done twice or left; a sandbox that lived on needs no replay."""
    is_clean = row["is_equal"] and not row["left"] and not any(row[key] for key in MUST_BE_0)
    return bool(is_clean and (row["kind"] == "tree" or not row["commands_replayed"]))


def main() -> int:
    """Run the kills; exit 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--tasks", help="tasks folder [default: the bundled tasks]")
    parser.add_argument("--kills", type=int, default=20, help="half of each kind")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--group-size", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the sampling")
    parser.add_argument("--quick", action="store_true", help="two kills of each kind")
    parser.add_argument("--json", action="store_true", help="one JSON object, nothing else")
    options = parser.parse_args()
    arguments = [*([options.tasks] if options.tasks else []), "--seed", str(options.seed)]
    arguments += ["--temperature", str(options.temperature), "--group-size", str(options.group_size)]
    root, rows = Path(tempfile.mkdtemp(prefix="dsec-kills-")), list[dict[str, object]]()
    moments = random.Random(options.seed)  # noqa: S311 - moments, not secrets
    try:
        shutil.copy(NATIVE_BINARY, root / BINARY)
        began = time.monotonic()
        finish(arguments, root / "reference")
        whole_s, reference = time.monotonic() - began, token_ids(root / "reference")
        for number in range(4 if options.quick else options.kills):
            directory = root / str(number)
            row = kill_once(KINDS[number % 2], arguments, directory, moments.uniform(0.2, whole_s))
            row["is_equal"] = token_ids(directory) == reference
            rows.append(row)
            if not options.json:
                print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            shutil.rmtree(directory)
    finally:
        shutil.rmtree(root)
    good = sum(map(is_good, rows))
    figures = {"kills": len(rows), "good": good, "rollouts": len(reference), "whole_s": round(whole_s, 2)}
    for kind in KINDS:
        figures[f"{kind}_commands_replayed"] = sum(int(str(r["commands_replayed"])) for r in rows if r["kind"] == kind)
    print(json.dumps({"figures": figures, "rows": rows}) if options.json else f"{good} of {len(rows)} good  {figures}")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
