"""`dsec serve` and `dsec run` before they begin: what does not suit is refused, a signal ends a start that waits."""

import json
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rollout.config import RolloutConfig
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT
from rollout.main import make_engine

HERE = "127.0.0.1:0"


@pytest.mark.parametrize("where", ["--out", "--root"])
def test_an_engine_whose_contexts_are_too_short_is_refused_before_anything_is_served(
    dsec: Any, tmp_path: Path, where: str
) -> None:
    environment = {"DSEC_CONTEXT_TOKENS_COUNT_MAX": "5000"}
    process = dsec.start("serve", where, tmp_path / "served", "--listen", HERE, env=environment)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert "DSEC_CONTEXT_TOKENS_COUNT_MAX is 5000, and a context of the engine embedded holds 2048 tokens" in err


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """Where an engine might be, which takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        yield server


def stopped(process: Any, silent: socket.socket, number: signal.Signals) -> tuple[int, str, str]:
    """How it ends by a signal that comes once it asks for its engine."""
    connection, _ = silent.accept()
    with connection:
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def engine_at(silent: socket.socket) -> tuple[str, str]:
    return "--engine", f"http://127.0.0.1:{silent.getsockname()[1]}"


@pytest.mark.parametrize("token", ["", "correct-horse-battery"])
def test_a_start_that_waits_for_its_engine_lives_and_says_so_at_both_ports(
    dsec: Any, tmp_path: Path, silent: socket.socket, token: str
) -> None:
    (wanted, url), headers = engine_at(silent), {"authorization": f"Bearer {token}"} if token else {}
    with socket.socket() as kept:  # the port, from all others
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        http, unix = f"127.0.0.1:{kept.getsockname()[1]}", f"unix:{tmp_path / 'served.sock'}"
        ports = ("--listen", unix, "--http", http, wanted, url)
        process = dsec.start("serve", "--out", tmp_path / "served", *ports, env={"DSEC_ROLLOUT_KEY": token})
        connection, _ = silent.accept()
        with connection, httpx2.Client(base_url=f"http://{http}", timeout=60) as client:
            assert client.get("/live").status_code == 200
            reason = f"this worker is starting: ask again (no engine draws yet: {url}: it was not opened yet)"
            for route in ("/health", "/v1/models", "/is_paused"):
                asked = client.get(route, headers=headers)
                assert (asked.status_code, asked.headers["retry-after"]) == (503, "1"), asked.text
                assert asked.json()["error"]["message"].endswith(reason)
            chat = client.post("/v1/completions", headers=headers, json={"prompt": "x", "request_id": "mine"})
            assert (chat.status_code, chat.json()["error"]["code"]) == (503, "UNREACHABLE")
            assert (url in client.get("/health").text) == (not token)
            with grpc.insecure_channel(unix) as channel:
                check, answer = health_pb2_grpc.HealthStub(channel).Check, health_pb2.HealthCheckResponse
                asked_of = {"": answer.SERVING, "rollout.pb.v1.RolloutService": answer.NOT_SERVING}
                for name, status in asked_of.items():
                    assert check(health_pb2.HealthCheckRequest(service=name), timeout=60).status == status
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, "", "dsec: stopped before it served\n")


def test_a_signal_ends_a_start_that_waits_for_its_engine(dsec: Any, tmp_path: Path, silent: socket.socket) -> None:
    process = dsec.start("serve", "--out", tmp_path / "served", "--listen", HERE, *engine_at(silent))
    assert stopped(process, silent, signal.SIGTERM) == (0, "", "dsec: stopped before it served\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_waits_for_its_engine_is_ended_by_a_signal_and_can_be_begun_again(
    dsec: Any, make_task: Callable[..., Path], tmp_path: Path, silent: socket.socket, number: signal.Signals
) -> None:
    asked = ("run", make_task(tmp_path / "task"), "--agent", "oracle", "--out", tmp_path / "run", "--json")
    ended = stopped(dsec.start(*asked, *engine_at(silent)), silent, number)
    assert ended == (128 + number, "", f"stopped by {number.name} before it began: nothing has run\n")
    assert not (tmp_path / "run/summary.json").exists()
    assert dsec.done(*asked).json()["solved"] == 1


def test_a_resume_that_waits_for_its_engine_is_ended_by_a_signal_and_says_how_to_go_on(
    dsec: Any, make_task: Callable[..., Path], tmp_path: Path, silent: socket.socket
) -> None:
    run = tmp_path / "run"
    slow = make_task(tmp_path / "task")
    (slow / "solution/solve.sh").write_text("sleep 5; echo yes > /app/done.txt\n")
    process = dsec.start("run", slow, "--agent", "oracle", "--out", run)
    while b"sandbox_prepared" not in b"".join(path.read_bytes() for path in run.glob("wal/*.wal")):
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    assert "finish with: " in process.communicate(timeout=120)[1]
    engine = engine_at(silent)
    code, out, err = stopped(dsec.start("run", "--resume", "--out", run, "--json", *engine), silent, signal.SIGINT)
    assert (code, json.loads(out)["finished"]) == (130, 0)
    assert err.endswith(f"dsec run --resume --out {run} {' '.join(engine)}\n")
    assert dsec.done("run", "--resume", "--out", run, "--json").json()["solved"] == 1


@pytest.mark.parametrize("command", ["serve", "run"])
def test_a_tokenizer_whose_ids_the_embedded_model_was_not_taught_is_refused(
    dsec: Any, tmp_path: Path, command: str
) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    shutil.copy(DEFAULT_CHECKPOINT / "tokenizer.json", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    spelled = {token_id: token for token, token_id in tokenizer["model"]["vocab"].items()}
    tokenizer["model"]["vocab"] |= {spelled[500]: 501, spelled[501]: 500}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    ran = dsec(command, "--out", tmp_path / "out", "--tokenizer", folder)
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert f"{folder / 'tokenizer.json'} is another model's: its ids are not those of the embedded" in ran.err
    assert "--engine" in ran.err


def test_the_same_ids_in_another_file_suit_the_embedded_model(tmp_path: Path) -> None:
    tokenizer = json.loads((DEFAULT_CHECKPOINT / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))  # spaced and escaped in another way
    assert (tmp_path / "tokenizer.json").read_bytes() != (DEFAULT_CHECKPOINT / "tokenizer.json").read_bytes()
    assert make_engine(RolloutConfig(tokenizer=tmp_path)).checkpoint == DEFAULT_CHECKPOINT
