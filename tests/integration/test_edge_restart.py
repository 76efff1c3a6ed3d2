"""An Edge that is killed, stopped, or not alone, as real processes: what its sandboxes and clients see of it."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsec.edge.keeper import short_name


@pytest.fixture
def start_edge(dsec: Any, edge_process: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts an Edge of the test's own; stopped after."""
    started: list[Any] = []

    def start(**env: str) -> Any:
        started.append(edge_process(dsec, tmp_path, **env))
        return started[-1]

    yield start
    for one in started:
        if one.process.returncode is None:
            one.stop()


def test_a_killed_edge_loses_neither_sandboxes_nor_commands(start_edge: Callable[..., Any]) -> None:
    edge = start_edge()
    sandbox = edge.done("create").strip()
    edge.done("exec", sandbox, "--", "mkfifo", "/root/go")
    background = (
        "exec",
        sandbox,
        "--key",
        "bg",
        "--",
        "sh",
        "-c",
        "echo $$ > /root/pid; read -r line < /root/go; echo $line",
    )
    waiting = [edge.begin(*background), edge.begin("exec", sandbox, "--json", *background[2:])]
    edge.done("exec", sandbox, "--", "sh", "-c", "until test -s /root/pid; do sleep 0.01; done")
    edge.kill()
    edge.start()
    assert edge.ready["adopted"] == 1
    edge.done("exec", sandbox, "--", "sh", "-c", "kill -0 $(cat /root/pid) && echo went > /root/go")
    streamed, told = (process.communicate(timeout=120)[0] for process in waiting)
    assert streamed == "went\n"
    assert base64.b64decode(json.loads(told)["stdout"]) == b"went\n"
    assert [process.returncode for process in waiting] == [0, 0]


def test_a_stopped_edge_leaves_its_sandboxes_to_the_next(dsec: Any, tmp_path: Path) -> None:
    where = ("--directory", tmp_path / "state", "--listen", f"unix:{tmp_path}/sock")
    env = {"DSEC_API_URL": f"unix:{tmp_path}/sock", "DSEC_EDGE_KEEP_S": "20"}

    def serve(*options: str) -> subprocess.Popen[str]:
        process: subprocess.Popen[str] = dsec.start("edge", "serve", *where, *options, env=env)
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"dsec: serving unix:{tmp_path}/sock")
        return process

    first = serve()
    sandbox = dsec.done("create", env=env).out.strip()
    first.terminate()
    _, err = first.communicate(timeout=120)
    assert (first.returncode, err) == (
        0,
        "dsec: 1 sandbox lives on for DSEC_EDGE_KEEP_S; the next `dsec edge serve` takes them up\n",
    )
    second = serve("--destroy-on-exit")
    assert dsec.done("exec", sandbox, "--", "echo", "here", env=env).out == "here\n"
    refused = dsec("edge", "serve", "--directory", tmp_path / "state", "--listen", f"unix:{tmp_path}/other", env=env)
    assert refused.code in (2, 3)
    second.terminate()
    _, err = second.communicate(timeout=120)
    assert err == "dsec: nothing is left\n"


def is_kept(state: Path) -> bool:
    """Whether a keeper waits for the next Edge."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe, short_name(state / "keeper.sock") as name:
        return probe.connect_ex(name) == 0


@pytest.mark.parametrize("options", [(), ("--destroy-on-exit",)])
def test_an_edge_with_nothing_to_keep_leaves_nothing(dsec: Any, tmp_path: Path, options: tuple[str, ...]) -> None:
    where = ("edge", "serve", "--directory", tmp_path / "state", "--listen", f"unix:{tmp_path}/sock", *options)
    edge = dsec.start(*where)
    assert edge.stdout.readline().startswith("dsec: serving")
    assert is_kept(tmp_path / "state")
    edge.terminate()
    assert edge.communicate(timeout=120)[1] == "dsec: nothing is left\n"
    assert not is_kept(tmp_path / "state")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp:127.0.0.1:{taken.getsockname()[1]}"
        failed = dsec(*where, "--listen", address, env={"DSEC_API_KEY": "token" * 4})
    assert failed.code != 0
    assert "dsec: nothing is left\n" in failed.err
    assert address in failed.err
    assert not is_kept(tmp_path / "state")


def test_what_a_failed_test_would_leave_is_ended_for_the_next(dsec: Any, edge_process: Any, tmp_path: Path) -> None:
    killed, living = (edge_process(dsec, tmp_path / name, DSEC_EDGE_KEEP_S="1") for name in ("killed", "living"))
    for edge in (killed, living):
        edge.done("create")
        edge.done("pause", edge.done("create").strip())
    killed.kill()
    assert len(dsec.guests()) > 0
    dsec.end()
    assert (dsec.guests(), dsec.cgroups(), living.process.returncode) == ([], [], -9)
