"""Checks of running commands: exit codes, signals, arguments, environment, time and process trees."""

# ruff: noqa: D103, S108, S311  (a check is described by its name; paths inside a sandbox; test data)

from __future__ import annotations

import asyncio
import hashlib
import random
import time

from dsec.conformance.check import ENV, Check, check, fresh, line, refusal_of, require, shell
from dsec.errors import InvalidArgumentError
from dsec.files import Files
from dsec.sandbox import Sandbox, Substrate
from dsec.types import PATH, STDIN_BYTES_MAX, Command, Defaults, SandboxSpec

STUBBORN_TREE = """
trap '' TERM INT HUP
(setsid bash -c 'trap "" TERM HUP; exec -a stubborn sleep 987654' &)
(setsid setsid bash -c '(exec -a stubborn sleep 987654) & disown; exit' &)
while :; do :; done
"""


async def _stubborn_count(sandbox: Sandbox) -> str:
    return await line(sandbox, "pgrep -cf '^stubborn' || true")


async def _until_stubborn_count(sandbox: Sandbox, count: str) -> None:
    async with asyncio.timeout(10):
        while await _stubborn_count(sandbox) != count:
            continue


@check()
async def every_exit_code_comes_back(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        codes = [(await shell(sandbox, f"exit {code}")).exit_code for code in range(256)]
        require(codes == list(range(256)), codes)


@check()
async def death_by_a_signal_is_128_plus_its_number(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        for name, number in {"SEGV": 11, "KILL": 9, "TERM": 15, "PIPE": 13}.items():
            result = await shell(sandbox, f"kill -{name} $$")
            require(result.exit_code == 128 + number and not result.timed_out and not result.oom_killed, result)


@check()
async def a_missing_program_is_127_and_says_so(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        for name in ("/no/such/program", "no-such-program", ""):
            result = await sandbox.exec(Command(argv=(name,), env=ENV))
            require(result.exit_code == 127 and b"No such file" in result.stderr.data, result)


@check()
async def a_file_that_is_not_a_program_is_126(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        for name in ("/etc/passwd", "/tmp"):
            result = await sandbox.exec(Command(argv=(name,), env=ENV))
            require(result.exit_code == 126 and b"Permission denied" in result.stderr.data, result)


@check()
async def a_program_that_is_being_written_is_126(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        await line(sandbox, "cp /bin/true /tmp/busy; sleep 300 3>> /tmp/busy > /dev/null 2>&1 & true")
        await line(sandbox, "until pgrep -x sleep > /dev/null; do :; done")
        result = await sandbox.exec(Command(argv=("/tmp/busy",), env=ENV))
        require(result.exit_code == 126 and b"Text file busy" in result.stderr.data, result)


@check()
async def a_missing_directory_is_refused_by_name(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        try:
            await sandbox.exec(Command(argv=("true",), cwd="/no/such/place", env=ENV))
        except InvalidArgumentError as error:
            require("/no/such/place" in str(error), error)
        else:
            require(False, "ran in a missing directory")
        result = await sandbox.exec(Command(argv=("pwd",), cwd="/var/tmp", env=ENV))
        require(result.stdout.data == b"/var/tmp\n", result)


@check()
async def arguments_pass_no_shell(substrate: Substrate) -> None:
    words = ("a b", "$HOME", "`id`", "'\"\\n", "", "-n", "*", "é\n\t")
    async with fresh(substrate) as sandbox:
        result = await sandbox.exec(Command(argv=("printf", "%s|", *words), env=ENV))
        require(result.stdout.data.decode() == "|".join(words) + "|", result)


@check()
async def a_megabyte_of_arguments_arrives(substrate: Substrate) -> None:
    words = tuple(f"{index:0100000d}" for index in range(10))
    async with fresh(substrate) as sandbox:
        result = await sandbox.exec(Command(argv=("printf", "%s", *words), env=ENV))
        require(result.stdout.data.decode() == "".join(words), result.exit_code)


@check()
async def the_environment_is_what_was_given_and_three_variables_that_are_always_there(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        for user, home in (("", "/root"), ("nobody", "/home/nobody"), ("7:8", "/")):
            given = {"B": "2 x", "A": ""}
            result = await sandbox.exec(Command(argv=("/usr/bin/env",), env=given, user=user))
            wanted = {"PATH": PATH, "LANG": "C.UTF-8", "HOME": home, **given}
            require(_lines(wanted) == sorted(result.stdout.data.decode().splitlines()), result)
        given = {"PATH": "", "LANG": "", "HOME": ""}
        result = await sandbox.exec(Command(argv=("/usr/bin/env",), env=given))
        require(_lines(given) == sorted(result.stdout.data.decode().splitlines()), result)


def _lines(env: dict[str, str]) -> list[str]:
    return sorted(f"{name}={value}" for name, value in env.items())


@check()
async def what_a_command_leaves_out_is_as_the_sandbox_has_it(substrate: Substrate) -> None:
    says = "pwd; id -u; echo $A-$B; echo $HOME"
    defaults = Defaults(env={"A": "1", "B": "1", "PATH": "/usr/bin"}, cwd="/var/tmp", user="nobody")
    async with fresh(substrate, SandboxSpec(defaults=defaults)) as sandbox:
        plain = await sandbox.exec(Command(argv=("sh", "-c", f"{says}; echo $PATH"), env={"B": "2"}))
        require(plain.stdout.data.split() == [b"/var/tmp", b"65534", b"1-2", b"/home/nobody", b"/usr/bin"], plain)
        explicit = Command(argv=("sh", "-c", says), env={"A": ""}, cwd="/", user="root")
        result = await sandbox.exec(explicit)
        require(result.stdout.data.split() == [b"/", b"0", b"-1", b"/root"], result)
        await Files(sandbox).write("/root/mine", b"files are root's, whoever commands are")
    error = await refusal_of(substrate.create(SandboxSpec(defaults=Defaults(cwd="here"))))
    require(isinstance(error, InvalidArgumentError) and "here" in str(error), error)


@check()
async def programs_are_found_on_the_given_path(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        await line(sandbox, "mkdir /opt/x && printf '#!/bin/sh\\necho mine' > /opt/x/ls && chmod +x /opt/x/ls")
        result = await sandbox.exec(Command(argv=("ls",), env={"PATH": "/nowhere:/opt/x:/usr/bin"}))
        require(result.stdout.data == b"mine\n", result)


@check()
async def binary_stdin_arrives_whole_and_then_ends(substrate: Substrate) -> None:
    data = random.Random(7).randbytes(5 << 20)
    async with fresh(substrate) as sandbox:
        result = await shell(sandbox, "sha256sum; cat; echo end", stdin=data)
        require(result.stdout.data.decode() == f"{hashlib.sha256(data).hexdigest()}  -\nend\n", result)


@check()
async def no_stdin_is_end_of_file(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        result = await shell(sandbox, "cat; echo rc=$?", timeout_s=5)
        require(result.stdout.data == b"rc=0\n", result)


@check()
async def a_command_need_not_read_its_stdin(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        result = await shell(sandbox, "exec <&-; echo done", stdin=bytes(STDIN_BYTES_MAX))
        require(result.stdout.data == b"done\n" and result.exit_code == 0, result.exit_code)


@check()
async def a_timeout_kills_the_whole_tree_before_it_answers(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        started = time.monotonic()
        result = await shell(sandbox, STUBBORN_TREE, timeout_s=1)
        require(result.timed_out and result.exit_code == 137, result)
        require(time.monotonic() - started < 6, "slow")
        require(await _stubborn_count(sandbox) == "0", "part of the tree lives")


@check()
async def cancelling_kills_the_whole_tree(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        running = asyncio.create_task(shell(sandbox, STUBBORN_TREE, timeout_s=100))
        await _until_stubborn_count(sandbox, "2")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await _until_stubborn_count(sandbox, "0")


@check()
async def a_background_child_that_holds_the_pipe_does_not_delay_the_end(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        started = time.monotonic()
        result = await shell(sandbox, "sleep 300 & until pgrep -x sleep > /dev/null; do :; done; echo hi")
        require(result.stdout.data == b"hi\n" and time.monotonic() - started < 4, result)
        require(await line(sandbox, "pgrep -c sleep") == "1", "the background child is gone")


@check()
async def a_kill_by_timeout_spares_the_background_of_others(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        await shell(sandbox, "sleep 300 &")
        require((await shell(sandbox, "sleep 200", timeout_s=0.2)).timed_out)
        require(await line(sandbox, "pgrep -a sleep | cut -d' ' -f2-") == "sleep 300", "wrong survivors")


@check()
async def a_command_that_kills_others_starts_alone(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        stubborn = asyncio.create_task(shell(sandbox, STUBBORN_TREE, timeout_s=60))
        await shell(sandbox, "setsid nohup sleep 300 > /dev/null 2>&1 &")
        await _until_stubborn_count(sandbox, "2")
        others = "ls -d /proc/[0-9]* | wc -l; pgrep -fc '^sleep 300|^stubborn' || true"
        alone = Command(argv=("bash", "-c", others), env=ENV, kill_others=True)
        result = await sandbox.exec(alone)
        require(result.stdout.data.split()[1:] == [b"0"], result)
        require((await stubborn).exit_code == 137, "a running command outlived it")
        require(await line(sandbox, "echo alive") == "alive", "the sandbox did not")


@check()
async def zombies_are_reaped(substrate: Substrate) -> None:
    async with fresh(substrate, SandboxSpec(pids_count_max=64)) as sandbox:
        for _ in range(4):
            await line(sandbox, "for i in $(seq 40); do (setsid true &) ; done; wait")
        async with asyncio.timeout(10):
            while (found := await line(sandbox, "grep -l 'State:.Z' /proc/[0-9]*/status | wc -l")) != "0":
                require(int(found) < 64, found)


@check()
async def commands_run_side_by_side(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        # Each waits for a file of every other: none can end unless all run.
        script = "mkdir -p /tmp/seen && touch /tmp/seen/$$; until [ $(ls /tmp/seen | wc -l) = 8 ]; do sleep 0.1; done"
        results = await asyncio.gather(*(shell(sandbox, script, timeout_s=60) for _ in range(8)))
        require([result.exit_code for result in results] == [0] * 8, results)


@check()
async def a_command_leads_its_own_session_without_a_terminal(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        require(await line(sandbox, "[ $(ps -o sid= -p $$) = $$ ] && ps -o tty= -p $$") == "?")


@check()
async def the_basics_are_those_of_ordinary_linux(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        facts = await line(
            sandbox,
            "for t in '-c /dev/null' '-c /dev/urandom' '-w /dev/shm' '-d /proc/self' '-w /tmp' '-k /tmp' "
            "'-r /etc/passwd' '-r /etc/resolv.conf' '-L /dev/fd' '-w /root' '-L /bin' '-e /usr/bin/python3'; do "
            "test $t || echo MISSING $t; done; "
            "python3 -c 'import multiprocessing as m,tempfile,socket,pty; m.Lock(); tempfile.mkdtemp(); "
            'socket.socketpair(); pty.openpty()\' || echo MISSING py; getent passwd "$(id -u)" >/dev/null '
            "|| echo MISSING passwd; getent hosts localhost >/dev/null || echo MISSING localhost; "
            "awk 'BEGIN{print \"awk\"}'; umask; ulimit -c; hostname; id -un",
        )
        require(facts.split("\n") == ["awk", "0022", "0", "sandbox", "root"], facts)


CHECKS: tuple[Check, ...] = (
    every_exit_code_comes_back,
    death_by_a_signal_is_128_plus_its_number,
    a_missing_program_is_127_and_says_so,
    a_file_that_is_not_a_program_is_126,
    a_program_that_is_being_written_is_126,
    a_missing_directory_is_refused_by_name,
    arguments_pass_no_shell,
    a_megabyte_of_arguments_arrives,
    the_environment_is_what_was_given_and_three_variables_that_are_always_there,
    what_a_command_leaves_out_is_as_the_sandbox_has_it,
    programs_are_found_on_the_given_path,
    binary_stdin_arrives_whole_and_then_ends,
    no_stdin_is_end_of_file,
    a_command_need_not_read_its_stdin,
    a_timeout_kills_the_whole_tree_before_it_answers,
    cancelling_kills_the_whole_tree,
    a_background_child_that_holds_the_pipe_does_not_delay_the_end,
    a_kill_by_timeout_spares_the_background_of_others,
    a_command_that_kills_others_starts_alone,
    zombies_are_reaped,
    commands_run_side_by_side,
    a_command_leads_its_own_session_without_a_terminal,
    the_basics_are_those_of_ordinary_linux,
)
