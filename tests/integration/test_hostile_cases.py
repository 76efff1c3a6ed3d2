"""The hostile cases of tests/golden/hostile that concern sandboxes, each run in a real one as it is written there.

What `expect` says to machines is checked by one table, what it says in prose (`also`) by a function of the case
below, and by the tests that proofs.json names.  A key or a case that nothing here knows fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from dsec.conformance.check import ENV
from dsec.conformance.resources import beside
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.edge.substrates.container_sandbox import ContainerSandbox
from dsec.errors import DsecError, InvalidArgumentError, NotFoundError
from dsec.files import Files
from dsec.types import OUTPUT_BYTES_MAX, Command, ExecResult, SandboxSpec

pytestmark = pytest.mark.asyncio(loop_scope="module")

DATA = Path(__file__).resolve().parents[1] / "golden/hostile"
CASES = [json.loads(line) for line in (DATA / "cases.jsonl").read_text().splitlines()]
DRIVEN = [case for case in CASES if case["area"] in {"exec", "output", "files", "resources", "isolation"}]
CANARY = f"canary-{os.getpid()}"
MEMORY_GROWTH_BYTES_MAX = 64 << 20
DISK_KIB = SandboxSpec().disk_bytes >> 10
Answer = ExecResult | DsecError | bytes


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def substrate() -> AsyncIterator[ContainerSubstrate]:
    containers = ContainerSubstrate()
    await containers.open()
    yield containers
    await containers.close()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def host_port() -> AsyncIterator[int]:
    """A port of this host's loopback that somebody listens on."""
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Runs an operation of kind `host`; what it left behind is taken away."""
    sessions: list[int] = []
    mark, said = tmp_path / "mark", tmp_path / "said"
    mark.touch()

    def run(script: str) -> str:
        env = {**os.environ, "CANARY": CANARY, "MARK": str(mark), "SANDBOX_ROOT": "/no/path/of/ours"}
        with said.open("wb") as out:
            shell = subprocess.Popen(["bash", "-c", script], env=env, stdout=out, start_new_session=True)
        sessions.append(shell.pid)
        assert shell.wait() == 0, script
        return said.read_text()

    yield run
    for session in sessions:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(session, signal.SIGKILL)
    for left in (Path(f"/root/h8_canary_{CANARY}"), Path("/etc/h8canary")):
        left.unlink(missing_ok=True)


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) << 10


class Play:
    """One case: its sandboxes by name, what they answered, and what the host said."""

    def __init__(
        self, case: dict[str, Any], substrate: ContainerSubstrate, port: int, host: Callable[[str], str]
    ) -> None:
        self.expect: dict[str, Any] = case["expect"]
        self.answers: list[Answer] = []
        self.host_said = ""
        self._substrate = substrate
        self._port = port
        self._on_host = host
        self._boxes: dict[str, ContainerSandbox] = {}

    @property
    def ran(self) -> list[ExecResult]:
        return [answer for answer in self.answers if isinstance(answer, ExecResult)]

    @property
    def said(self) -> list[str]:
        return [result.stdout.data.decode() for result in self.ran]

    async def box(self, name: str = "") -> ContainerSandbox:
        if name not in self._boxes:
            self._boxes[name] = await self._substrate.create(SandboxSpec())
        return self._boxes[name]

    async def perform(self, op: dict[str, Any]) -> None:
        try:
            await getattr(self, f"on_{op['op']}")(op)
        except DsecError as error:
            self.answers.append(error)

    async def close(self) -> None:
        """Every sandbox of it answers once more, whatever was done in it, and ends."""
        for sandbox in self._boxes.values():
            result = await sandbox.exec(Command(argv=("bash", "-c", "echo ok-$((6*7))"), env=ENV, timeout_s=5))
            is_full = result.exit_code == 126 or b"Resource temporarily unavailable" in result.stderr.data
            assert result.stdout.data == b"ok-42\n" or is_full, result
            await sandbox.destroy()
            assert not Path(f"/proc/{sandbox.host_pid}").exists(), "its pid 1, which ends after all others"

    async def perform_all(self, ops: list[dict[str, Any]]) -> None:
        for number, op in enumerate(ops):
            async with asyncio.timeout(self.expect.get(f"max_wall_s{number}", self.expect.get("max_wall_s"))):
                await self.perform(op)

    async def run(self, op: dict[str, Any], argv: tuple[str, ...], stdin: bytes = b"") -> None:
        command = Command(
            argv=argv,
            env=ENV,
            stdin=stdin,
            timeout_s=op.get("timeout_s", 20),
            user=op.get("user", ""),
            output_bytes_max=self.expect.get("stdout_len", OUTPUT_BYTES_MAX),
        )
        self.answers.append(await (await self.box(op.get("box", ""))).exec(command))

    async def on_exec(self, op: dict[str, Any]) -> None:
        script = op["cmd"].replace("$GATEWAY_PORT", str(self._port))
        stdin = eval(op.get("stdin_py", "b''"), {"random": random})
        await self.run(op, ("bash", "-lc", script), stdin)

    async def on_exec_argv(self, op: dict[str, Any]) -> None:
        await self.run(op, tuple(op["argv"]))

    async def on_exec_py(self, op: dict[str, Any]) -> None:
        """A script that is longer than an argument may be: refused as one, and run from stdin."""
        script = eval(op["cmd_py"], {})
        with pytest.raises(InvalidArgumentError):
            await self.run(op, ("bash", "-lc", script))
        await self.run(op, ("bash", "-l"), script.encode())

    async def on_read(self, op: dict[str, Any]) -> None:
        self.answers.append(await Files(await self.box()).read(op["path"]))

    async def on_write(self, op: dict[str, Any]) -> None:
        await Files(await self.box()).write(op["path"], op["text"].encode())

    async def on_upload_tar(self, op: dict[str, Any]) -> None:
        """Each archive into a directory of its own; then what lies outside of it, and what lies in it."""
        files = Files(await self.box())
        for tar in sorted(DATA.glob(op["tar"])):
            await self.perform({"op": "upload", "files": files, "tar": tar, "dest": op["dest"]})
            outside = f"find / -xdev -name 'h8evil*' -not -path '{op['dest']}/*'"
            inside = f"find {op['dest']} -type b -o -type c -o -name ok.txt"
            await self.run({}, ("bash", "-c", f"{outside}; {inside}; rm -rf {op['dest']}"))

    async def on_upload(self, op: dict[str, Any]) -> None:
        await op["files"].upload_tree(_pieces(op["tar"].read_bytes()), op["dest"])
        self.answers.append(b"")

    async def on_host(self, op: dict[str, Any]) -> None:
        """Outside.  The archives aim at /var/tmp: to look through all of a large disk would only take time."""
        self.host_said += await asyncio.to_thread(self._on_host, op["cmd"].replace("find / ", "find /var/tmp /etc "))

    async def on_note(self, op: dict[str, Any]) -> None:
        return


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    yield data


# -- what `expect` says to machines --------------------------------------------------------------


def _error_class(answer: Answer) -> str:
    said = str(answer)
    if isinstance(answer, NotFoundError):
        return "NOT_FOUND"
    assert isinstance(answer, InvalidArgumentError), answer
    if "Is a directory" in said:
        return "IS_DIRECTORY"
    return "PERMISSION" if "ermission denied" in said or "not permitted" in said else "INVALID"


EXPECT: dict[str, Callable[[Play], Any]] = {
    "exit_code": lambda play: play.ran[0].exit_code,
    "exit_codes": lambda play: [result.exit_code for result in play.ran],
    "stdout": lambda play: play.said[0],
    "stdout1": lambda play: play.said[1],
    "stdout_last": lambda play: play.said[0].splitlines()[-1],
    "stdout_hex": lambda play: play.ran[0].stdout.data.hex(),
    "stdout_len": lambda play: play.ran[0].stdout.total_bytes,
    "stdout_sha256": lambda play: hashlib.sha256(play.ran[0].stdout.data).hexdigest(),
    "stdout_host": lambda play: play.host_said,
    "truncated": lambda play: play.ran[0].stdout.is_truncated,
    "oom": lambda play: play.ran[0].oom_killed,
    "error_class0": lambda play: "timeout" if play.ran[0].timed_out else "",
    "error_classes": lambda play: [_error_class(answer) for answer in play.answers],
}
PROSE = {"also", "or_else"}
WALL = {"max_wall_s", "max_wall_s0"}
"""Of every operation, and of the first: seconds after which it is broken off."""


# -- what it says in prose -----------------------------------------------------------------------


def _flood(play: Play) -> None:
    assert play.ran[0].stdout.total_bytes == 2_000_000_000
    assert len(play.ran[0].stdout.data) == OUTPUT_BYTES_MAX


def _nonexistent(play: Play) -> None:
    assert [result.exit_code for result in play.ran] == [127, 126]
    assert isinstance(play.answers[2], InvalidArgumentError)


def _disk_fill(play: Play) -> None:
    filled, total = play.said[0].splitlines()
    assert int(filled.split()[0]) <= DISK_KIB << 10
    assert int(total.split()[1]) == DISK_KIB
    assert int(total.split()[3]) == 0


def _caps(play: Play) -> None:
    lines = play.said[0].splitlines()
    facts = dict(line.split(":\t") for line in lines[:4])
    for name in ("CapEff", "CapBnd"):
        assert not [bit for bit in (2, 12, 16, 17, 19, 21, 27) if int(facts[name], 16) >> bit & 1]
    assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")
    outside = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "mnt", "net", "ipc", "uts", "user")]
    assert len(lines[-6:]) == len(outside)
    assert not set(lines[-6:]) & set(outside)


def _read_host(play: Play) -> None:
    assert Path("/etc/h8canary").read_text() == f"{CANARY}\n"
    reads = play.answers[1:]
    assert len(reads) == 8
    assert [answer for answer in reads if not isinstance(answer, NotFoundError | InvalidArgumentError)] == []
    assert not [answer for answer in reads if CANARY in str(answer)]


def _archives(play: Play) -> None:
    uploads, looks = play.answers[::2], play.said
    assert len(uploads) == len(looks) == 8
    for upload, look in zip(uploads, looks, strict=True):
        assert upload == b"" or isinstance(upload, InvalidArgumentError)
        assert look in ("", "/tmp/up/ok.txt\n")
    assert (uploads[0], looks[0]) == (b"", "/tmp/up/ok.txt\n")


def _network(play: Play) -> None:
    assert play.said[0] == "end\n1\n"  # the one line of /proc/net/unix is its head


def _cross_sandbox(play: Play) -> None:
    count, refused = play.said[1].splitlines()
    assert count == "0"
    assert refused.startswith("ConnectionRefusedError")


def _signals(play: Play) -> None:
    assert len(play.ran) == len(play.answers) == 4
    assert not [result for result in play.ran if result.timed_out or result.oom_killed]


def _nothing_more(play: Play) -> None:
    """The rest is seen in every case (the sandbox lives, its neighbour answers, no timeout, no process after its end).

    What is not, the tests show that proofs.json names.
    """


ALSO: dict[str, Callable[[Play], None]] = {
    "out-flood-finite": _flood,
    "exit-signals": _signals,
    "bg-holds-stdout": _nothing_more,
    "exec-nonexistent": _nonexistent,
    "fork-bomb": _nothing_more,
    "oom": _nothing_more,
    "disk-fill": _disk_fill,
    "caps": _caps,
    "sym-read-host": _read_host,
    "sym-write-host": _nothing_more,  # its last operation fails if the host was touched
    "tar-evil-upload": _archives,
    "download-dir-inspect": _nothing_more,
    "net-localhost-gateway": _network,
    "cross-sandbox": _cross_sandbox,
}


@pytest.mark.parametrize("case", DRIVEN, ids=lambda case: case["id"])
async def test_a_hostile_case_ends_as_it_must(
    substrate: ContainerSubstrate,
    host_port: int,
    host: Callable[[str], str],
    descriptors: Callable[[], list[str]],
    case: dict[str, Any],
) -> None:
    before, memory_before, play = descriptors(), resident_bytes(), Play(case, substrate, host_port, host)
    if "a second sandbox answers" in str(play.expect.get("also")):
        await beside(await play.box("beside"), play.perform_all(case["ops"]))
    else:
        await play.perform_all(case["ops"])
    for key, wanted in play.expect.items():
        assert key in PROSE | WALL or EXPECT[key](play) == wanted, key
    assert [result.timed_out for result in play.ran[1:]].count(True) == 0
    assert "error_class0" in play.expect or not play.ran or not play.ran[0].timed_out
    if "also" in play.expect:
        ALSO[case["id"]](play)
    await play.close()
    assert len(after := descriptors()) <= len(before), (before, after)
    assert resident_bytes() - memory_before < MEMORY_GROWTH_BYTES_MAX
