"""Checks of pausing, and of snapshots and what is made from them."""

# ruff: noqa: D103  (a check is described by its name)

from __future__ import annotations

import asyncio
import time

import msgspec

from dsec.conformance.check import Check, check, fresh, line, python, refusal_of, require, script
from dsec.conformance.processes import ready
from dsec.errors import NotFoundError, SandboxLostError
from dsec.sandbox import Sandbox, Substrate
from dsec.types import Command, LayerId, SandboxSpec

PAUSE_S = 0.8  # here time itself is what is checked

# Everything in the places that checks write to: kind, mode, owner, size, links, target, content.
_LISTING = """
import hashlib, os, stat
for top in ("/srv", "/home", "/root", "/opt", "/etc", "/var/tmp", "/usr/share/bash-completion", "/usr/local"):
  for folder, names, files in os.walk(top):
    names.sort()
    within = sorted(os.path.join(folder, name) for name in files + names)
    for path in [folder] + [path for path in within if os.path.islink(path) or not os.path.isdir(path)]:
      s = os.lstat(path)
      what = os.readlink(path) if stat.S_ISLNK(s.st_mode) else ""
      if stat.S_ISREG(s.st_mode): what = hashlib.file_digest(open(path, "rb"), "sha256").hexdigest()
      if path in ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/mtab"): continue
      size = s.st_size if stat.S_ISREG(s.st_mode) else 0
      links = s.st_nlink if stat.S_ISREG(s.st_mode) else 0
      when = int(s.st_mtime) if stat.S_ISREG(s.st_mode) else 0
      print(repr(path), oct(s.st_mode), s.st_uid, s.st_gid, size, links, when, what)
"""
_WRITE = """
set -e
mkdir -p /srv/d/e; echo one > /srv/a; printf '' > /srv/empty; ln -s a /srv/link; ln -s /no/where /srv/broken
echo two > '/srv/a b\t"é'; ln /srv/a /srv/d/hard; chmod 6751 /srv/d/hard; chmod 1777 /srv/d; chown 77:88 /srv/empty
mkfifo -m 640 /srv/fifo; chmod 000 /srv/d/e; touch -d 2001-02-03T04:05:06.789Z /srv/d/hard
head -c 50000000 /dev/urandom > /srv/large; truncate -s 30000000 /srv/sparse; echo x >> /etc/profile
mkdir -p /usr/local/new; echo tool > /usr/local/new/tool
"""


@check(kind="port")
async def pausing_and_resuming_twice_is_safe(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        await sandbox.resume()
        await sandbox.pause()
        await sandbox.pause()
        await sandbox.resume()
        await sandbox.resume()
        require((await sandbox.exec(Command(argv=("/bin/true",)))).exit_code == 0)


@check(kind="port")
async def a_command_resumes_a_paused_sandbox(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        await sandbox.pause()
        require((await sandbox.exec(Command(argv=("/bin/true",)))).exit_code == 0)
        await sandbox.pause()
        process = await sandbox.start(Command(argv=("/bin/true",)))
        require((await process.wait()).exit_code == 0, await process.wait())


@check(kind="port")
async def a_paused_sandbox_can_be_destroyed(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        await sandbox.exec(Command(argv=("/bin/true",)))
        await sandbox.pause()
        async with asyncio.timeout(20):
            await sandbox.destroy()
        for attempt in (sandbox.pause(), sandbox.resume(), sandbox.exec(Command(argv=("/bin/true",)))):
            require(isinstance(await refusal_of(attempt), SandboxLostError))


@check()
async def nothing_runs_while_a_sandbox_is_paused(substrate: Substrate) -> None:
    widest = (
        "import os, time\n"
        "gap, last = 0, time.monotonic()\n"
        "print('ready', flush=True)\n"
        "while not os.path.exists('/tmp/go'): now = time.monotonic(); gap = max(gap, now - last); last = now\n"
        "print(max(gap, time.monotonic() - last))"
    )
    async with fresh(substrate) as sandbox:
        loop = await sandbox.start(script(f'exec python3 -c "{widest}"'))
        await ready(loop)
        await sandbox.pause()
        await asyncio.sleep(PAUSE_S)
        await sandbox.resume()
        await line(sandbox, "touch /tmp/go")
        gap = float((await loop.wait()).stdout.data.split()[1])
        require(gap > PAUSE_S * 0.9, f"it stood still for {gap} s of {PAUSE_S} s")


@check()
async def time_in_a_pause_does_not_count(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        begun_s = time.monotonic()
        process = await sandbox.start(
            script("echo ready; until [ -e /tmp/go ]; do sleep 0.02; done; exit 3", timeout_s=PAUSE_S + 1)
        )
        await ready(process)
        for _ in range(3):
            await sandbox.pause()
            await asyncio.sleep(PAUSE_S)
            await sandbox.resume()
        await line(sandbox, "touch /tmp/go")
        result = await process.wait()
        own_s = time.monotonic() - begun_s - 3 * PAUSE_S
        require(result.exit_code == 3 and not result.timed_out, result)
        require(0 < result.duration_s < own_s + 0.01, f"{result.duration_s} s of at most {own_s} s")


@check()
async def a_pause_keeps_processes_files_and_pipes(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        talk = "echo ready; x=kept; read line; echo $x $line"
        process = await sandbox.start(script(talk, keep_stdin_open=True))
        await ready(process)
        await line(sandbox, "echo disk > /tmp/f; echo memory > /dev/shm/f")
        await sandbox.pause()
        await sandbox.resume()
        await process.write_stdin(b"typed\n")
        require((await process.wait()).stdout.data == b"ready\nkept typed\n", await process.wait())
        require(await line(sandbox, "cat /tmp/f /dev/shm/f") == "disk\nmemory")


async def _fork(substrate: Substrate, layers: tuple[LayerId, ...]) -> Sandbox:
    return await substrate.create(SandboxSpec(layers=layers))


@check("snapshot")
async def a_snapshot_holds_all_that_was_written(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        await line(sandbox, _WRITE, timeout_s=60)
        before = await python(sandbox, _LISTING, timeout_s=60)
        layer = await sandbox.snapshot()
        async with fresh(substrate, SandboxSpec(layers=(layer,))) as fork:
            require(layer.startswith("sha256:") and len(layer) == 7 + 64, layer)
            after = await python(fork, _LISTING, timeout_s=60)
            changed = set(before.splitlines()) ^ set(after.splitlines())
            require(not changed, "\n".join(sorted(changed)))
            require(await line(fork, "hostname; pwd; id -u; echo $((6*7))") == "sandbox\n/\n0\n42")


@check("snapshot")
async def a_snapshot_remembers_what_was_removed(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        await line(
            sandbox,
            "set -e; mkdir -p /srv/deep/er /srv/gone; touch /srv/deep/er/{a,b} /srv/gone/x; rm -r /usr/share/perl5 "
            "/usr/share/bash-completion 2>/dev/null || true; rm /usr/bin/expr /etc/shells; rm -r /etc/pam.d; "
            "mkdir -p /etc/pam.d; touch /etc/pam.d/mine",
        )
        first = await sandbox.snapshot()
    seen = "ls /usr/bin/expr /etc/shells 2>/dev/null; ls /etc/pam.d; ls -R /srv | grep -v '^$' | tr '\\n' ' '"
    async with fresh(substrate, SandboxSpec(layers=(first,))) as fork:
        require((await line(fork, seen)).startswith("mine\n"), await line(fork, seen))
        await line(
            fork, "set -e; rm -r /srv/gone /srv/deep; mkdir -p /srv/deep; touch /srv/deep/new; rm /srv/nope || true"
        )
        second = await fork.snapshot()
    async with fresh(substrate, SandboxSpec(layers=(second, first))) as fork:
        told = await line(fork, seen)
        require(told == "mine\n/srv: deep /srv/deep: new ", told)


@check("snapshot")
async def a_fork_goes_on_by_itself(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        await line(sandbox, "echo 1 > /srv/n; echo x > /dev/shm/gone; nohup sleep 300 > /dev/null 2>&1 &")
        await line(sandbox, "until pgrep -x sleep > /dev/null; do :; done")
        layer = await sandbox.snapshot()
        require(await line(sandbox, "pgrep -c sleep; cat /dev/shm/gone") == "1\nx", "the original was touched")
        async with (
            fresh(substrate, SandboxSpec(layers=(layer,))) as one,
            fresh(substrate, SandboxSpec(layers=(layer,))) as two,
        ):
            for number, each in enumerate((sandbox, one, two)):
                await line(each, f"echo {number} >> /srv/n; rm -f /usr/bin/true{number}; touch /srv/{number}")
            for number, each in enumerate((sandbox, one, two)):
                require(await line(each, "cat /srv/n; ls /srv") == f"1\n{number}\n{number}\nn", number)
            require(await line(one, "ls /dev/shm; pgrep -c sleep || true") == "0", "processes or memory in a layer")


@check("snapshot")
async def a_fork_of_a_fork_has_both(substrate: Substrate) -> None:
    layers: tuple[LayerId, ...] = ()
    for step in range(4):
        sandbox = await _fork(substrate, layers)
        try:
            seen = await line(sandbox, "cat /srv/log 2>/dev/null || true")
            require(seen.split() == [str(i) for i in range(step)], seen)
            await line(sandbox, f"echo {step} >> /srv/log; rm -f /srv/only{step - 1}; touch /srv/only{step}")
            require(await line(sandbox, "cd /srv; echo only*") == f"only{step}")
            layers = (await sandbox.snapshot(), *layers)
        finally:
            await sandbox.destroy()
    require(len(set(layers)) == 4, layers)


@check("snapshot")
async def a_snapshot_of_nothing_and_of_a_paused_sandbox_works(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        empty = await sandbox.snapshot()
        await line(sandbox, "echo kept > /srv/f")
        await sandbox.pause()
        paused = await sandbox.snapshot()
        require(await line(sandbox, "cat /srv/f") == "kept")
    for layer, expected in ((empty, ""), (paused, "kept")):
        async with fresh(substrate, SandboxSpec(layers=(layer,))) as fork:
            require(await line(fork, "cat /srv/f 2>/dev/null || true") == expected, layer)


@check("snapshot", "layers")
async def layers_lie_over_each_other_in_the_given_order(substrate: Substrate) -> None:
    made = []
    for name in ("one", "two"):
        async with fresh(substrate) as sandbox:
            await line(sandbox, f"echo {name} > /srv/same; echo {name} > /srv/{name}; echo {name} > /usr/same")
            made.append(await sandbox.snapshot())
    for order, top in (((made[0], made[1]), "one"), ((made[1], made[0]), "two")):
        async with fresh(substrate, SandboxSpec(layers=order)) as sandbox:
            told = await line(sandbox, "cat /srv/same /usr/same /srv/one /srv/two")
            require(told == f"{top}\n{top}\none\ntwo", told)


@check("snapshot")
async def a_layer_that_is_not_there_is_not_found(substrate: Substrate) -> None:
    spec = SandboxSpec(layers=(LayerId("sha256:" + "0" * 64),))
    require(isinstance(await refusal_of(substrate.create(spec)), NotFoundError))
    strange = msgspec.structs.replace(spec, layers=(LayerId("../../etc"),))
    require((await refusal_of(substrate.create(strange))).fault == "caller")


CHECKS: tuple[Check, ...] = (
    pausing_and_resuming_twice_is_safe,
    a_command_resumes_a_paused_sandbox,
    a_paused_sandbox_can_be_destroyed,
    nothing_runs_while_a_sandbox_is_paused,
    time_in_a_pause_does_not_count,
    a_pause_keeps_processes_files_and_pipes,
    a_snapshot_holds_all_that_was_written,
    a_snapshot_remembers_what_was_removed,
    a_fork_goes_on_by_itself,
    a_fork_of_a_fork_has_both,
    a_snapshot_of_nothing_and_of_a_paused_sandbox_works,
    layers_lie_over_each_other_in_the_given_order,
    a_layer_that_is_not_there_is_not_found,
)
