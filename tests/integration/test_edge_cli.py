"""`dsec edge serve` and its commands as people have them: real processes, real sandboxes, kill -9, a terminal."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import tarfile
import termios
from pathlib import Path
from typing import Any

import pytest

RESIZED = (
    "import os, signal; winch = {signal.SIGWINCH}; signal.pthread_sigmask(signal.SIG_BLOCK, winch); "
    'print("ready-%d" % (6 * 7), flush=True); signal.sigwait(winch); print("%d by %d" % os.get_terminal_size())'
)
PROBE = "printf 'a\\0b'; echo err >&2; exit 7"


def test_a_command_passes_its_output_and_its_exit_code_through(edge: Any, sandbox: str) -> None:
    ran = edge("exec", sandbox, "--", "bash", "-c", PROBE)
    assert (ran.code, ran.out, ran.err) == (7, "a\0b", "err\n")
    for code, argv in (
        (0, "true"),
        (255, "exit 255"),
        (127, "exec /no/such"),
        (126, "exec /etc/passwd"),
        (139, "kill -SEGV $$"),
    ):
        assert edge("exec", sandbox, "--", "bash", "-c", argv).code == code


def test_json_holds_the_bytes_and_what_became_of_the_command(edge: Any, sandbox: str) -> None:
    ran = edge("exec", sandbox, "--json", "--", "bash", "-c", PROBE)
    said = ran.json()
    assert ran.code == said["exit_code"] == 7
    assert base64.b64decode(said["stdout"]) == b"a\0b"
    assert base64.b64decode(said["stderr"]) == b"err\n"
    assert [said[name] for name in ("truncated", "timed_out", "oom")] == [False, False, False]
    assert said["duration_s"] > 0
    late = edge("exec", sandbox, "--timeout-s", 0.2, "--json", "--", "sleep", "60")
    assert (late.code, late.json()["timed_out"]) == (137, True)
    assert "timed out" in edge("exec", sandbox, "--timeout-s", 0.2, "--", "sleep", "60").err


def test_output_that_the_log_does_not_hold_is_read_after(edge: Any, sandbox: str) -> None:
    program = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 4000)"
    whole = bytes(range(256)) * 4000
    assert edge.raw("exec", sandbox, "--", "python3", "-c", program) == whole
    said = json.loads(edge.raw("exec", sandbox, "--json", "--key", "k", "--", "python3", "-c", program))
    assert (base64.b64decode(said["stdout"]), said["truncated"]) == (whole, False)
    assert edge.raw("logs", sandbox, "k") == whole
    over = edge("exec", sandbox, "--json", "--", "head", "-c", 3_000_000, "/dev/zero").json()
    assert (over["truncated"], over["stdout_bytes"], len(base64.b64decode(over["stdout"]))) == (
        True,
        3_000_000,
        1 << 20,
    )


def test_a_command_is_found_by_its_number_too_and_one_that_did_not_run_says_why(edge: Any, sandbox: str) -> None:
    edge.done("exec", sandbox, "--", "echo", "first")
    assert edge.done("logs", sandbox, "#1") == "first\n"
    refused = edge("exec", sandbox, "--key", "k", "-u", "nobody:nosuch", "--", "true")
    assert refused.code == 125
    assert "user 'nobody:nosuch' is not known in this sandbox" in refused.err
    assert "No such file" not in refused.err
    late = edge("logs", sandbox, "k")
    assert late.code == 2
    assert "nobody:nosuch" in late.err or "no command" in late.err


def test_a_key_runs_once_and_belongs_to_one_command(edge: Any, sandbox: str) -> None:
    counting = ("exec", sandbox, "--key", "k", "--", "sh", "-c", "echo >> /root/n; wc -l < /root/n")
    assert [edge.done(*counting).strip() for _ in range(3)] == ["1", "1", "1"]
    refused = edge("exec", sandbox, "--key", "k", "--", "true")
    assert (refused.code, refused.out) == (125, "")
    assert "another command" in refused.err


def test_input_is_passed_on_when_it_is_asked_for(edge: Any, sandbox: str) -> None:
    data = os.urandom(3_000_000)
    assert edge.raw("exec", "-i", sandbox, "--", "cat", stdin=data) == data
    assert edge.raw("exec", sandbox, "--", "cat", stdin=data) == b""
    assert edge.raw("exec", "-i", sandbox, "--", "head", "-c", "5", stdin=data) == data[:5]


def test_where_and_as_whom_a_command_runs_is_the_callers_choice(edge: Any, sandbox: str) -> None:
    options = ("-w", "/tmp", "-e", "A=b", "-u", "nobody")
    told = edge.done("exec", sandbox, *options, "--", "sh", "-c", "pwd; echo $A; id -un")
    assert told.split() == ["/tmp", "b", "nobody"]


def test_our_options_end_where_the_command_begins(edge: Any, sandbox: str) -> None:
    for options in ((sandbox,), ("-w", "/", sandbox), (sandbox, "-w", "/"), (sandbox, "-w", "/", "--")):
        assert edge.done("exec", *options, "sh", "-c", 'pwd; echo "$@"', "-w", "-e", "--").split() == ["/", "-e", "--"]


def test_a_command_that_ran_out_of_memory_says_so(edge: Any) -> None:
    sandbox = edge.done("create", "--memory-mib", 64).strip()
    ran = edge("exec", sandbox, "python3", "-c", "b'a' * 300_000_000")
    assert (ran.code, "out of memory" in ran.err) == (137, True)
    edge("exec", sandbox, "--timeout-s", 0.1, "sleep", "60")
    told = [line.split() for line in edge.done("trajectory", sandbox).splitlines()]
    assert [row[2:4] for row in told[1:]] == [["oom", "137"], ["timeout", "137"]]
    edge.done("exec", sandbox, "--key", "last", "sh", "-c", "echo out; echo err >&2")
    edge.done("rm", sandbox)
    late = edge("logs", sandbox, "last")
    assert (late.code, late.out, late.err) == (0, "out\n", "err\n")
    assert edge.done("logs", sandbox, "#3") == edge.done("logs", sandbox, "3") == "out\n"
    assert edge.done("logs", sandbox, "last", "--directory", edge.directory / "state") == "out\n"
    assert edge("logs", sandbox, "none").code == 2


@pytest.mark.parametrize(
    "arguments",
    [("exec", "sb-none", "--", "true"), ("exec", "{id}"), ("exec", "{id}", "-x"), ("exec", "-t", "{id}", "--", "true"),
     ("exec", "{id}", "-w", "tmp", "--", "true")],
)  # fmt: skip
def test_a_failure_of_our_own_is_125_and_a_line(edge: Any, sandbox: str, arguments: tuple[str, ...]) -> None:
    ran = edge(*(argument.format(id=sandbox) for argument in arguments), stdin=subprocess.DEVNULL)
    assert (ran.code, ran.out) == (125, "")
    assert ran.err
    assert "Traceback" not in ran.err


def test_an_interrupt_kills_the_command_and_a_reader_that_goes_away_ends_it(edge: Any, sandbox: str) -> None:
    process = edge.begin("exec", sandbox, "--key", "int", "--", "sh", "-c", "echo begun; exec sleep 300")
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    reader = edge.begin("exec", sandbox, "--key", "pipe", "--", "yes")
    assert reader.stdout is not None
    assert reader.stdout.readline() == "y\n"
    reader.stdout.close()
    reader.wait(timeout=120)
    reader.communicate()
    ended = {view["key"]: view for view in map(json.loads, edge.done("trajectory", sandbox, "--json").splitlines())}
    assert [ended[key]["exit_code"] for key in ("int", "pipe")] == [137, 137]


def test_a_killed_client_leaves_its_command_to_whoever_asks_next(edge: Any, sandbox: str) -> None:
    argv = ("sh", "-c", "echo begun; read -r line < /root/go; echo $line")
    edge.done("exec", sandbox, "--", "mkfifo", "/root/go")
    process = edge.begin("exec", sandbox, "--key", "k", "--", *argv)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.kill()
    process.communicate()
    edge.done("exec", sandbox, "--", "sh", "-c", "echo went > /root/go")
    assert edge.done("exec", sandbox, "--key", "k", "--", *argv) == "begun\nwent\n"


def test_a_terminal_is_the_commands_own(edge: Any, sandbox: str) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 90, 0, 0))
    process = edge.begin("exec", "-it", sandbox, "--", "bash", "--norc", stdin=theirs)
    try:
        assert process.stdout is not None
        said = ""

        def wait_for(text: str) -> None:
            nonlocal said
            while text not in said:
                more = os.read(process.stdout.fileno(), 4096)  # type: ignore[union-attr]
                assert more, said
                said += more.decode()
            said = said.partition(text)[2]

        os.write(ours, b"PS1=; stty size; tty; sh -c 'echo sleep-$((6*7)); exec sleep 300'\n")
        wait_for("30 90")
        wait_for("/dev/pts/")
        wait_for("sleep-42")
        os.write(ours, b"\x03")  # typed into the sandbox: it ends the sleep, not us
        # Not at the prompt: before each one readline sets the size that it has just read, over a resize between.
        os.write(ours, f"python3 -c '{RESIZED}'\n".encode())
        wait_for("ready-42")
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        process.send_signal(signal.SIGWINCH)
        wait_for("100 by 40")
        os.write(ours, b"exit 5\n")
        process.communicate(timeout=120)
        assert process.returncode == 5
        assert termios.tcgetattr(theirs)[3] & termios.ECHO  # as it was
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)


def test_files_and_trees_go_in_and_come_out_as_they_were(edge: Any, sandbox: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "a b" / "deep").mkdir(parents=True)
    (tree / "a b" / "file").write_bytes(os.urandom(2_000_000))
    (tree / "a b" / "file").chmod(0o751)
    (tree / "a b" / os.fsdecode(b"\xff")).write_text("not utf-8")
    (tree / "link").symlink_to("a b/file")
    edge.done("cp", tree, f"{sandbox}:/srv")
    edge.done("cp", f"{sandbox}:/srv/tree", tmp_path / "back")
    assert subprocess.run(["diff", "-r", tree, tmp_path / "back"], check=False).returncode == 0
    assert (tmp_path / "back" / "a b" / "file").stat().st_mode & 0o777 == 0o751
    assert (tmp_path / "back" / "link").readlink() == Path("a b/file")
    edge.raw("cp", "-", f"{sandbox}:/root/from-stdin", stdin=b"\0\xff")
    assert edge.raw("cp", f"{sandbox}:/root/from-stdin", "-") == b"\0\xff"
    archive = edge.raw("cp", f"{sandbox}:/srv/tree", "-")
    edge.raw("cp", "-", f"{sandbox}:/opt/", stdin=archive)
    assert "a b" in edge.done("exec", sandbox, "--", "ls", "/opt")
    edge.done("cp", tree / "a b" / "file", f"{sandbox}:/root/")
    assert edge.done("exec", sandbox, "--", "stat", "-c", "%a %s", "/root/file") == "751 2000000\n"
    for bad in (
        ("a", "b"),
        (f"{sandbox}:/a", f"{sandbox}:/b"),
        (f"{sandbox}:/none", "x"),
        ("/none", f"{sandbox}:/x"),
        (f"{sandbox}:rel", "x"),
    ):
        assert edge("cp", *bad, cwd=tmp_path).code == 2


def test_a_tree_from_a_sandbox_cannot_leave_its_place(edge: Any, sandbox: str, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    attack = tmp_path / "attack.tar"
    with tarfile.open(attack, "w") as made:
        for name, kind, target in (
            ("./out", tarfile.SYMTYPE, str(tmp_path / "victim")),
            ("./out/evil", tarfile.REGTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            made.addfile(member)
    edge.done("cp", attack, f"{sandbox}:/root/attack.tar")
    fake_tar = "#!/bin/sh\nexec cat /root/attack.tar\n"
    edge.raw(
        "exec",
        "-i",
        sandbox,
        "--",
        "sh",
        "-c",
        "cat > /usr/local/bin/tar; chmod +x /usr/local/bin/tar",
        stdin=fake_tar.encode(),
    )
    ran = edge("cp", f"{sandbox}:/srv", tmp_path / "copy")
    assert ran.code == 2
    assert "cannot unpack" in ran.err
    assert list((tmp_path / "victim").iterdir()) == []


def test_the_life_of_a_sandbox_can_be_led_from_a_shell(edge: Any) -> None:
    made = json.loads(
        edge.done("create", "--memory-mib", 256, "--label", "job=7", "--allow", "api.example.com:443", "--json")
    )
    sandbox = made["id"]
    assert (made["spec"]["memory_bytes"], made["labels"]) == (256 << 20, {"job": "7"})
    edge.done("exec", sandbox, "--key", "one", "--", "sh", "-c", "echo 1 > /root/state")
    assert json.loads(edge.done("pause", sandbox, "--json")) == [sandbox]
    listed = json.loads(edge.done("ps", "--label", "job=7", "--json"))
    assert [(one["id"], one["state"]) for one in listed] == [(sandbox, "paused")]
    assert edge.done("exec", sandbox, "--", "cat", "/root/state") == "1\n"
    edge.done("exec", sandbox, "--", "sh", "-c", "echo 2 > /root/state")
    edge.done("pause", sandbox)
    edge.done("resume", sandbox)
    edge.done("network", sandbox)
    layer = edge.done("snapshot", sandbox).strip()
    assert layer.startswith("sha256:")
    forks = json.loads(edge.done("fork", sandbox, "--count", 2, "--label", "job=8", "--json"))
    (branch,) = edge.done("fork", sandbox, "--after", "one", "--label", "job=8").split()
    again = edge.done("create", "--layer", layer, "--label", "job=8").strip()
    states = {one: edge.done("exec", one, "--", "cat", "/root/state").strip() for one in (*forks, branch, again)}
    assert list(states.values()) == ["2", "2", "1", "2"]
    assert set(edge.done("ps", "-q", "--label", "job=8").split()) == set(states)
    rows = {row.split()[0]: row.split()[1:] for row in edge.done("ps").splitlines()}
    assert rows[sandbox][-1] == "job=7"
    assert [rows[one][2] for one in (sandbox, again)] == ["host", "host+1"]
    assert rows[sandbox][1][-1] in "sm"
    edge.done("rm", sandbox, *states)
    assert edge.done("ps", "-q") == ""
    assert edge("exec", sandbox, "--", "true").code == 125
    told = edge.done("trajectory", sandbox)
    assert [line.split()[:2] for line in told.splitlines()[1:2]] == [["1", "one"]]
    assert edge.done("trajectory", sandbox, "--directory", edge.directory / "state") == told
    status = json.loads(edge.done("edge", "status", "--json"))
    assert status["total"]["memory_bytes"] > 0
    assert isinstance(status["used"]["memory_bytes"], int)
    assert re.search(r"^memory, promised +[\d.]+ GiB +[\d,.]+ GiB$", edge.done("edge", "status"), re.MULTILINE)


def test_an_image_that_is_not_made_where_the_edge_looks_is_said_to_be_elsewhere(edge: Any, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    store = str(tmp_path / "images")
    env = {**edge.env, "DSEC_IMAGES_DIRECTORY": store, "DSEC_IMAGES_SHARED": str(tmp_path / "shared")}
    made = edge.dsec.done("image", "build", "directory", tmp_path / "tree", "--tag", "elsewhere:1", env=env)
    assert store in made.err
    assert f"the Edge at {edge.url} has another store" in made.err
    missing = edge.dsec("image", "publish", "nowhere:1", env=env)
    assert (missing.code, store in missing.err) == (2, True)


def test_where_no_edge_is_every_command_says_how_to_get_one(session_dsec: Any, tmp_path: Path) -> None:
    for code, arguments in ((125, ("exec", "sb-1", "--", "true")), (3, ("ps",)), (3, ("create",))):
        ran = session_dsec(*arguments, env={"DSEC_API_URL": f"unix:{tmp_path}/none"})
        assert (ran.code, ran.out) == (code, "")
        assert "dsec edge serve" in ran.err


def test_a_user_who_may_not_open_the_socket_hears_that_and_not_that_no_edge_is_there(edge: Any) -> None:
    as_other = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    command = [*as_other, Path(sys.executable).with_name("dsec"), "ps"]
    told = subprocess.run(
        command, env={**os.environ, "DSEC_API_URL": edge.url}, capture_output=True, text=True, check=False
    )
    said = f"dsec: we may not open the Edge's socket {edge.url} (Permission denied): "
    assert (told.returncode, told.stderr.startswith(said)) == (3, True), told.stderr


def test_a_flag_or_a_command_that_cannot_be_meant_is_named_as_it_was_typed(edge: Any, sandbox: str) -> None:
    assert "'--cpus': 0.0 is not in" in edge("create", "--cpus", 0).err
    late = edge("exec", sandbox, "--timeout-s", 0, "true")
    assert (late.code, "'--timeout-s': 0.0 is not in" in late.err) == (125, True)
    edge.done("exec", sandbox, "-d", "--key", "endless", "--", "sleep", "600")
    forked = edge("fork", sandbox, "--after", "endless")
    assert "has no known end" in forked.err
    assert "name an earlier command" in forked.err


def test_a_program_that_is_interrupted_leaves_no_sandbox(edge: Any, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from dsec import Sandbox\n"
        "with Sandbox.create() as sandbox:\n"
        "    sandbox.commands.run('echo begun; sleep 300', on_stdout=lambda text: print(text, end='', flush=True))\n"
    )
    process = edge.begin(program, command=sys.executable)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert edge.done("ps", "-q") == ""
