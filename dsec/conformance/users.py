"""Checks of users: who a command is, by the sandbox's own account files, and what that keeps it from."""

# ruff: noqa: D103  (a check is described by its name)

from __future__ import annotations

import contextlib

from dsec.conformance.check import ENV, Check, check, fresh, line, refusal_of, require, script, shell
from dsec.errors import InvalidArgumentError
from dsec.sandbox import Substrate
from dsec.types import Command

_ACCOUNT = (
    "echo 'agent:x:1234:1235:Agent:/home/agent:/bin/bash' >> /etc/passwd; "
    "printf 'agents:x:1235:\\nbuild:x:1300:other,agent\\nextra:x:1301:agent\\nothers:x:1302:other\\n' >> /etc/group"
)


@check()
async def a_user_is_a_name_or_digits(substrate: Substrate) -> None:
    ids = "echo $(id -u) $(id -g)"
    async with fresh(substrate) as sandbox:
        await line(sandbox, _ACCOUNT)
        expected = {"": "0 0", "root": "0 0", "agent": "1234 1235", "1234": "1234 1235", "4321": "4321 4321",
                    "77:88": "77 88", "0:5": "0 5",
                    "agent:build": "1234 1300", "agent:7": "1234 7", "77:extra": "77 1301"}  # fmt: skip
        for user, wanted in expected.items():
            seen = await line(sandbox, ids, user=user)
            require(seen == wanted, f"{user}: {seen}")


@check()
async def a_named_user_has_its_groups_and_no_more(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        await line(sandbox, _ACCOUNT)
        require(await line(sandbox, "id -G", user="agent") == "1235 1300 1301", await line(sandbox, "id", user="agent"))
        require(await line(sandbox, "id -G", user="77:88") == "88", await line(sandbox, "id", user="77:88"))
        require(
            await line(sandbox, "id -G", user="agent:extra") == "1301", await line(sandbox, "id", user="agent:extra")
        )


@check()
async def a_user_that_does_not_exist_is_refused(substrate: Substrate) -> None:
    bad = ("nosuchuser", "root:nosuchgroup", "nosuchuser:root", "root:", "root:a:b", "-1", "1:", ":1", "1:2:3",
           "99999999999", "4294967295", "1:4294967295", " 1", "1 ", "../root", "a" * 5000)  # fmt: skip
    async with fresh(substrate) as sandbox:
        for user in bad:
            error = await refusal_of(sandbox.exec(script("id", user=user)))
            require(isinstance(error, InvalidArgumentError), (user, error))
        require(await line(sandbox, "echo alive") == "alive")


@check()
async def another_user_cannot_touch_what_is_roots(substrate: Substrate) -> None:
    attempts = (
        "echo x >> /etc/passwd", "touch /usr/bin/x", "rm /usr/bin/env", "ls /root", "cat /etc/shadow", "touch /x",
        "kill -9 $(pgrep -o sleep)", "chown 0 /tmp/mine", "su -c true", "echo x > /proc/sys/kernel/hostname",
    )  # fmt: skip
    async with fresh(substrate) as sandbox:
        await line(sandbox, _ACCOUNT)
        process = await sandbox.start(script("exec sleep 300", timeout_s=60))
        await line(sandbox, "touch /tmp/mine; until pgrep -x sleep; do :; done", user="agent")
        for attempt in attempts:
            require((await shell(sandbox, attempt, user="agent")).exit_code != 0, attempt)
        require(await line(sandbox, "pgrep -c sleep") == "1")
        await process.kill()


@check()
async def another_user_cannot_become_root(substrate: Substrate) -> None:
    climb = (
        "cp /usr/bin/id /tmp/id && chmod 4755 /tmp/id",
        "grep -E '^Cap(Eff|Prm|Inh|Amb)' /proc/self/status | tr -d '0\\n\\t'; /tmp/id -u",
    )
    async with fresh(substrate) as sandbox:
        await line(sandbox, climb[0])
        seen = await line(sandbox, climb[1], user="77:88")
        require(seen == "CapInh:CapPrm:CapEff:CapAmb:77", seen)


@check()
async def account_files_that_are_not_text_are_read_as_far_as_they_go(substrate: Substrate) -> None:
    spoilt = "head -c 3000000 /dev/urandom > /etc/passwd; printf '\\nagent:x:1234:1235::/:/bin/sh\\n' >> /etc/passwd"
    async with fresh(substrate) as sandbox:
        await line(sandbox, spoilt)
        with contextlib.suppress(InvalidArgumentError):  # it may lie beyond the bound of what is read
            require(await line(sandbox, "id -u", user="agent") == "1234")
        require(await line(sandbox, "id -u", user="55") == "55")
        await line(sandbox, "rm /etc/passwd /etc/group; mkfifo /etc/passwd /etc/group")
        error = await refusal_of(sandbox.exec(script("id", user="agent", timeout_s=5)))
        require(isinstance(error, InvalidArgumentError), error)
        result = await sandbox.exec(Command(argv=("id", "-u"), env=ENV))  # a shell would read its account and wait
        require(result.stdout.data == b"0\n", "a pipe in place of the accounts keeps root out")


CHECKS: tuple[Check, ...] = (
    a_user_is_a_name_or_digits,
    a_named_user_has_its_groups_and_no_more,
    a_user_that_does_not_exist_is_refused,
    another_user_cannot_touch_what_is_roots,
    another_user_cannot_become_root,
    account_files_that_are_not_text_are_read_as_far_as_they_go,
)
