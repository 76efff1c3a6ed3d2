"""`dsec run` over an Edge, its own or a served one: killed alone, it goes on with the sandboxes that lived on."""

import contextlib
import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import wal
from dsec import Sandbox, SandboxLostError
from rollout.ledger import Ledger
from rollout.main import load_tokenizer, sandbox_labels

SOLVE_SH = "/solution/solve.sh"
SOLVE = "echo begun >> /app/begun; sleep 1.5; [ $(wc -l < /app/begun) = 1 ] && echo yes > /app/done.txt\n"


@pytest.fixture
def task(make_task: Callable[..., Path], tmp_path: Path) -> Path:
    """Solved only if its solution runs once in a sandbox, and to its end."""
    folder = make_task(tmp_path / "task")
    (folder / "solution/solve.sh").write_text(SOLVE)
    return folder


@pytest.fixture(params=["own", "served"])
def edge(request: pytest.FixtureRequest, dsec: Any, edge_process: Any, tmp_path: Path) -> Any:
    """None for a run with an Edge of its own, or one that is served."""
    if request.param == "own":
        yield None
        return
    served = edge_process(dsec, tmp_path / "edge")
    yield served
    assert sandboxes(served) == []
    served.stop()


def run(edge: Any, task: Path, out: Path) -> tuple[object, ...]:
    where = ("--edge", edge.url) if edge else ()
    return ("run", task, "--agent", "oracle", "--out", out, "--resume", "--json", *where)


def sandboxes(edge: Any) -> list[Any]:
    """Those that live."""
    found: list[Any] = json.loads(edge.done("ps", "--json"))
    return found


def in_its_solution(dsec: Any, edge: Any, task: Path, out: Path, **env: str) -> tuple[subprocess.Popen[str], str]:
    """A run whose solution runs, and the name of its sandbox."""
    process: subprocess.Popen[str] = dsec.start(*run(edge, task, out), env=env)
    while True:
        assert process.poll() is None, process.communicate()
        with contextlib.suppress(wal.WalError, subprocess.TimeoutExpired):
            process.wait(0.02)
        if not (out / "wal").exists():
            continue
        for trajectory in Ledger.read(out / "wal", load_tokenizer()).trajectories.values():
            if any(SOLVE_SH in entry.command.argv for entry in trajectory.entries.values()):
                return process, trajectory.sandbox_id


def kill(process: subprocess.Popen[str]) -> None:
    """The run, and nothing else."""
    process.kill()
    process.communicate()


def test_a_command_in_flight_is_collected_in_the_same_sandbox(dsec: Any, edge: Any, task: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process, sandbox_id = in_its_solution(dsec, edge, task, out)
    kill(process)
    (trajectory,) = Ledger.read(out / "wal", load_tokenizer()).trajectories.values()
    assert [SOLVE_SH in entry.command.argv for entry in trajectory.entries.values() if entry.result is None] == [True]
    summary = dsec.done(*run(None, task, out)).json()  # the run knows its Edge
    assert (summary["solved"], summary["infra_failures"], summary["resumes"]) == (1, 0, 1)
    assert (summary["commands_replayed"], summary["commands_run_twice"]) == (0, 0)
    (trajectory,) = Ledger.read(out / "wal", load_tokenizer()).trajectories.values()
    assert (trajectory.incarnation, trajectory.sandbox_id) == (1, sandbox_id)
    assert not (out / "edge").exists()


def test_what_earlier_boots_left_goes_also_when_the_run_has_ended(dsec: Any, task: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    dsec.done(*run(None, task, out))
    (out / "edge/earlier-boot/log").mkdir(parents=True)
    dsec.done(*run(None, task, out))
    assert not (out / "edge").exists()


def test_a_copy_of_a_living_run_leaves_that_its_sandboxes(
    dsec: Any, edge_process: Any, task: Path, tmp_path: Path
) -> None:
    edge, out, copy = edge_process(dsec, tmp_path / "edge"), tmp_path / "run", tmp_path / "copy"
    process, sandbox_id = in_its_solution(dsec, edge, task, out)
    process.send_signal(signal.SIGSTOP)  # it lives, and will want its sandbox when the copy is done
    shutil.copytree(out, copy)
    copied = dsec.done(*run(edge, task, copy)).json()
    assert [view["id"] for view in sandboxes(edge)] == [sandbox_id]
    process.send_signal(signal.SIGCONT)
    summary = json.loads(process.communicate(timeout=120)[0])
    assert [each["solved"] for each in (copied, summary)] == [1, 1]
    assert [each["commands_replayed"] > 0 for each in (copied, summary)] == [True, False]
    (trajectory,) = Ledger.read(out / "wal", load_tokenizer()).trajectories.values()
    assert (trajectory.incarnation, trajectory.sandbox_id) == (1, sandbox_id)
    assert sandboxes(edge) == []
    edge.stop()


def test_a_run_is_found_where_it_was_moved_and_not_where_it_was_copied(tmp_path: Path) -> None:
    def labels(directory: Path) -> dict[str, str]:
        log = wal.Log.open(directory)
        try:
            return sandbox_labels(directory)
        finally:
            log.close()

    first = labels(tmp_path / "run")
    assert labels(tmp_path / "run") == first
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert labels(tmp_path / "moved") == first
    copied = labels(tmp_path / "copy")
    assert (copied["run"] == first["run"], copied["log"] == first["log"]) == (True, False)


def test_a_served_edge_that_is_killed_under_a_run_costs_it_nothing(
    dsec: Any, edge_process: Any, task: Path, tmp_path: Path
) -> None:
    edge, out = edge_process(dsec, tmp_path / "edge"), tmp_path / "run"
    process, _ = in_its_solution(dsec, edge, task, out)
    edge.kill()
    edge.start()
    said, err = process.communicate(timeout=120)
    summary = json.loads(said)
    assert (summary["solved"], summary["infra_failures"], summary["commands_replayed"]) == (1, 0, 0), err
    assert sandboxes(edge) == []
    edge.stop()


def test_more_rollouts_at_once_than_before_get_their_sandboxes(dsec: Any, task: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process, sandbox_id = in_its_solution(dsec, None, task, out, DSEC_EDGE_SANDBOXES_COUNT_MAX="16")
    kill(process)
    summary = dsec.done(*run(None, task, out), "--concurrency", 17).json()
    assert (summary["solved"], summary["infra_failures"], summary["commands_run_twice"]) == (1, 0, 0)
    (trajectory,) = Ledger.read(out / "wal", load_tokenizer()).trajectories.values()
    assert (trajectory.incarnation, trajectory.sandbox_id != sandbox_id) == (2, True)


def test_a_killed_run_that_nobody_resumes_leaves_nothing_at_the_edge(
    dsec: Any, edge_process: Any, task: Path, tmp_path: Path
) -> None:
    edge = edge_process(dsec, tmp_path / "edge")
    process, sandbox_id = in_its_solution(dsec, edge, task, tmp_path / "run", DSEC_LEASE_TTL_S="5")
    kill(process)
    while sandboxes(edge):
        pass
    with pytest.raises(SandboxLostError, match="lease_lapsed"):
        Sandbox.connect(sandbox_id, url=edge.url)
    summary = dsec.done(*run(edge, task, tmp_path / "run")).json()
    assert (summary["solved"], summary["commands_run_twice"]) == (1, 0)
    edge.stop()


def test_an_interrupted_run_destroys_its_sandboxes(dsec: Any, edge: Any, task: Path, tmp_path: Path) -> None:
    process, _ = in_its_solution(dsec, edge, task, tmp_path / "run")
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert dsec.guests() == []


def test_a_run_that_is_interrupted_while_it_starts_leaves_nothing(dsec: Any, task: Path, tmp_path: Path) -> None:
    process = dsec.start(*run(None, task, tmp_path / "run"))
    while not (tmp_path / "run/edge").exists():
        assert process.poll() is None, process.communicate()
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 143
    assert dsec.processes(dsec.sessions) == []


def test_an_edge_that_cannot_be_reached_is_told_before_anything_runs(dsec: Any, task: Path, tmp_path: Path) -> None:
    ran = dsec("run", task, "--out", tmp_path / "run", "--edge", f"unix:{tmp_path}/none")
    assert (ran.code, "no Edge answers at" in ran.err) == (3, True), ran.err
    ran = dsec("run", task, "--out", tmp_path / "run2", "--edge", "http://localhost")
    assert (ran.code, "is no address" in ran.err) == (2, True), ran.err
    assert not (tmp_path / "run2").exists()
