"""A host that cannot: not root, no cgroups, no overlayfs, a read-only or full disk.

Each runs in a mount namespace of its own, where the thing is masked; the host sees nothing of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SAME_RUN = "--group-size 2 --temperature 1 --seed 3 --turns-max 6 --concurrency 4"


def apart(dsec: Any, script: str) -> Any:
    """Run a shell script in a mount namespace of its own; `$DSEC` is the command."""
    return dsec("-m", "bash", "-c", script, command="unshare", env={"DSEC": dsec.path})


def test_a_host_without_root_is_told(dsec: Any, make_task: Any, tmp_path: Path) -> None:
    task = make_task(tmp_path / "task")
    tmp_path.chmod(0o777)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.name.startswith(("pytest-", "popen-")):
            folder.chmod(0o755)
    run = tmp_path / "run"
    ran = apart(dsec, f"exec setpriv --reuid 65534 --clear-groups $DSEC run {task} --out {run}")
    assert (ran.code, ran.out) == (3, ""), ran.err
    assert ran.err.startswith("dsec: this host cannot run sandboxes:\n")
    assert "  root: effective uid 65534; run as root (sudo)" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ("umount -l -R /sys/fs/cgroup", "cgroup2: not mounted; mkdir -p /sys/fs/cgroup/unified && mount"),
        (
            "grep -v overlay /proc/filesystems > {here}/fs; mount --bind {here}/fs /proc/filesystems",
            "overlayfs: not in /proc/filesystems; modprobe overlay",
        ),
    ],
)
def test_a_host_that_lacks_something_is_told_what_and_how_to_get_it(
    dsec: Any, make_task: Any, tmp_path: Path, mask: str, said: str
) -> None:
    task, run = make_task(tmp_path / "task"), tmp_path / "run"
    ran = apart(dsec, f"{mask.format(here=tmp_path)}; $DSEC run {task} --agent oracle --out {run}")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith("dsec: this host cannot run sandboxes:\n")
    assert f"  {said}" in ran.err
    assert "Traceback" not in ran.err
    told = apart(dsec, f"{mask.format(here=tmp_path)}; $DSEC doctor")
    assert (told.code, "missing" in told.out) == (3, True)
    # Nothing was begun: on a host that can, the same command does it.
    assert dsec.done("run", task, "--agent", "oracle", "--out", run, "--json").json()["solved"] == 1


def test_a_read_only_disk_is_told(dsec: Any, make_task: Any, tmp_path: Path) -> None:
    task, place = make_task(tmp_path / "task"), tmp_path / "place"
    place.mkdir()
    ran = apart(dsec, f"mount -t tmpfs -o ro none {place}; $DSEC run {task} --out {place}/run")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"dsec: cannot use {place}/run as a run directory: Read-only file system")
    ran = apart(dsec, f"mount -t tmpfs -o ro none {place}; $DSEC run {task} --out {place}")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith(f"dsec: cannot create {place}/wal: Read-only file system (EROFS)")


def test_on_a_full_disk_a_run_stops_or_waits_and_with_more_space_it_goes_on_as_if_nothing_had_been(
    dsec: Any, tasks: Path, finished: Path, tmp_path: Path
) -> None:
    """Whose write meets it first: the run's log ends the run; the Edge's journal waits, and begins nothing."""
    place, summary_path = tmp_path / "place", tmp_path / "summary.json"
    place.mkdir()
    ran = apart(
        dsec,
        f"""mount -t tmpfs -o size=200k none {place}
        $DSEC run {tasks} --out {place}/run {SAME_RUN} --json > {summary_path} 2> >(tee {tmp_path}/err >&2) & run=$!
        tail -n +1 -F --pid=$run {tmp_path}/err 2> /dev/null | grep -q "what ends waits"
        mount -o remount,size=20m {place}
        wait $run; code=$?; echo code $code
        [ $code = 0 ] || $DSEC run --resume --out {place}/run --json > {summary_path}; echo code $?
        $DSEC show {place}/run --json > {tmp_path}/records.jsonl; echo code $?""",
    )
    first, *rest = ran.out.split("\n")
    assert rest == ["code 0", "code 0", ""], ran.err
    assert first in ("code 0", "code 1", "code 3"), ran.err  # 1: what could not begin is left to a resume
    has_stopped = first == "code 3"
    told = [line for line in ran.err.splitlines() if line.startswith("dsec: ")]
    if has_stopped:
        line, advice = told
        assert line.startswith(f"dsec: cannot write {place}/run/wal/")
        assert "No space left on device (ENOSPC); acknowledged records are safe; free some space" in line
        assert advice.endswith(f" run --resume --out {place}/run")
    else:
        assert told == []
        assert "the journal is open again" in ran.err
    notices = (  # of the run's log, its Edge's
        "bytes of an unfinished write off",
        "the journal failed, opening it again",
        "what ends waits: the journal cannot be opened",
        "the journal is open again",
    )
    others = [notice for notice in ran.err.splitlines() if notice not in told]
    assert [notice for notice in others if not any(said in notice for said in notices)] == []
    summary = type(ran)(0, summary_path.read_text(), "").json()
    counts = ("finished", "infra_failures", "tokens_regenerated", "commands_run_twice")
    assert [summary[key] for key in counts] == [8, 0, 0, 0]
    assert (summary["resumes"] > 0) == (first != "code 0")
    records = type(ran)(0, (tmp_path / "records.jsonl").read_text(), "").lines()
    assert {r["rollout_id"]: r["token_ids"] for r in records} == {
        name: r["token_ids"] for name, r in dsec.show(finished).items()
    }


def test_results_that_do_not_fit_on_the_disk_are_told_and_leave_nothing_half_written(
    dsec: Any, finished: Path, tmp_path: Path
) -> None:
    """`room` kB are left on the disk: first the Arrow file does not fit, then the summary."""
    place = tmp_path / "place"
    place.mkdir()
    arrow_pages = -(-(finished / "trajectories.arrow").stat().st_size // 4096)
    for room in (0, 4 * arrow_pages):
        ran = apart(
            dsec,
            f"""mount -t tmpfs -o size=20m none {place}
            cp -r {finished} {place}/run && rm {place}/run/summary.json {place}/run/trajectories.arrow
            head -c {room}k /dev/zero > {place}/room
            cat /dev/zero > {place}/rest 2> {tmp_path}/no-space
            rm {place}/room
            $DSEC run --resume --out {place}/run; echo code $?
            ls -A {place}/run
            rm {place}/rest
            $DSEC run --resume --out {place}/run --json > {tmp_path}/summary.json; echo code $?""",
        )
        there = ["trajectories.arrow", "wal"] if room else ["wal"]
        assert ran.out.split("\n") == ["code 3", *there, "code 0", ""], ran.err
        (line,) = ran.err.splitlines()
        assert line.startswith(f"dsec: cannot write results to {place}/run: ")
        assert "No space left on device" in line
        assert line.endswith("the log is whole, run again with --resume")
        assert type(ran)(0, (tmp_path / "summary.json").read_text(), "").json()["finished"] == 8
