"""Checks of containment: what a command, root inside, can neither see nor do nor change for others."""

# ruff: noqa: D103  (a check is described by its name)

from __future__ import annotations

from dsec.conformance.check import Check, check, fresh, line, python, require, shell
from dsec.sandbox import Substrate

# Capabilities that would reach past the sandbox: SYS_ADMIN, SYS_PTRACE, SYS_MODULE, SYS_RAWIO,
# DAC_READ_SEARCH, NET_ADMIN, NET_RAW, MKNOD, SYS_CHROOT, SYS_BOOT, SYS_TIME, SYSLOG, BPF, PERFMON.
_FATAL_CAPABILITIES = sum(1 << bit for bit in (21, 19, 16, 17, 2, 12, 13, 27, 18, 22, 25, 34, 39, 38))

_SYSCALLS = """
import ctypes, errno, os, platform
libc = ctypes.CDLL(None, use_errno=True)
x86 = platform.machine() == "x86_64"
numbers = dict(bpf=321 if x86 else 280, perf_event_open=298 if x86 else 241, userfaultfd=323 if x86 else 282,
               io_uring_setup=425, setns=308 if x86 else 268, unshare=272 if x86 else 97, mount=165 if x86 else 40,
               umount2=166 if x86 else 39, pivot_root=155 if x86 else 41, chroot=161 if x86 else 51,
               open_by_handle_at=304 if x86 else 265, keyctl=250 if x86 else 219, add_key=248 if x86 else 217,
               init_module=175 if x86 else 105, kexec_load=246 if x86 else 104, reboot=169 if x86 else 142,
               open_tree=428, fsopen=430, mount_setattr=442, clone3=435, sethostname=170 if x86 else 161,
               settimeofday=164 if x86 else 170, syslog=103 if x86 else 116, fanotify_init=300 if x86 else 262,
               io_setup=206 if x86 else 0, io_destroy=207 if x86 else 1, io_getevents=208 if x86 else 4,
               io_submit=209 if x86 else 2, io_cancel=210 if x86 else 3, io_pgetevents=333 if x86 else 292)
for name, number in numbers.items():
    ctypes.set_errno(0)
    result = libc.syscall(number, 0, 0, 0, 0, 0, 0)
    print(name, "allowed" if result >= 0 else errno.errorcode[ctypes.get_errno()])
NEWUSER, SIGCHLD = 0x10000000, 17
result = libc.syscall(56 if x86 else 220, NEWUSER | SIGCHLD, 0, 0, 0, 0)
if result == 0: os._exit(0)
print("clone_newuser", "allowed" if result >= 0 else errno.errorcode[ctypes.get_errno()])
"""

_ABSENT = {
    "clone3": "it hides its flags from the filter",
    **dict.fromkeys(
        ("io_setup", "io_destroy", "io_getevents", "io_submit", "io_cancel", "io_pgetevents"),
        "its contexts are counted for the whole host",
    ),
}

# Takes inotify instances until it is refused, as one user after the other, and keeps them.
_WATCHERS = """
import ctypes, os, time
libc = ctypes.CDLL(None, use_errno=True)
for user in (0, 1000, 1001, 40000):
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.setresuid(user, user, user)
        count = 0
        while libc.inotify_init1(0) >= 0: count += 1
        os.write(writing, b"%d %d" % (count, ctypes.get_errno()))
        time.sleep(300)
    print(os.read(reading, 64).decode())
"""

# As every user of the namespace in turn: may it read pid 1's limits (the same right as setting them)?
# Then everything that a user may do to processes of the same user, as those that pid 1 could be.
_REACH = """
import ctypes, os, resource, signal
libc = ctypes.CDLL(None, use_errno=True)
x86 = os.uname().machine == "x86_64"
SETATTR, IOPRIO = (314, 251) if x86 else (274, 30)
def allowed(act):
    try: return act() != -1
    except OSError: return False
def as_user(user, act):
    os.setresgid(user, user, 0); os.setresuid(user, user, 0)
    try: return allowed(act)
    finally: os.setresuid(0, 0, 0); os.setresgid(0, 0, 0)
def limit(): resource.prlimit(1, resource.RLIMIT_NOFILE)
def grab(): return libc.syscall(438, os.pidfd_open(1), 3, 0)
users = []
for user in (*range(70000), 2**31 - 1, 2**32 - 2):
    try:
        if as_user(user, limit): print("prlimit", user)
        users.append(user)
    except OSError: pass
block = ctypes.create_string_buffer(16)
part = (ctypes.c_void_p * 2)(ctypes.addressof(block), 16)
acts = dict(
    affinity=lambda: os.sched_setaffinity(1, {0}), scheduler=lambda: os.sched_setscheduler(1, 3, os.sched_param(0)),
    param=lambda: os.sched_setparam(1, os.sched_param(0)), attr=lambda: libc.syscall(SETATTR, 1, block, 0),
    nice=lambda: os.setpriority(os.PRIO_PROCESS, 1, 19), ioprio=lambda: libc.syscall(IOPRIO, 1, 1, 3 << 13),
    ptrace=lambda: libc.ptrace(16, 1, 0, 0), seize=lambda: libc.ptrace(0x4206, 1, 0, 0), pidfd=grab,
    memory=lambda: libc.process_vm_readv(1, part, 1, part, 1, 0), mem=lambda: open("/proc/1/mem", "rb").close(),
    oom=lambda: open("/proc/1/oom_score_adj", "w").write("1"), limits=lambda: open("/proc/1/environ").read())
for user in {0, 65532, 65533, 65534, 65535, os.stat("/proc/1").st_uid} & set(users):
    for name, act in acts.items():
        if as_user(user, act): print(name, user)
    for number in range(1, 65):
        as_user(user, lambda: os.kill(1, number))
    as_user(user, lambda: os.setpriority(os.PRIO_USER, user, 5))
    as_user(user, lambda: libc.syscall(IOPRIO, 3, user, 3 << 13))
print(len(users) > 60000)
"""


@check()
async def only_own_processes_are_visible(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        names = await line(sandbox, "cat /proc/[0-9]*/comm | sort | uniq | tr '\\n' ' '")
        require(set(names.split()) <= {"init", "bash", "cat", "sort", "uniq", "tr"}, names)
        require(await line(sandbox, "ps -o args= -p 1") == "init")


@check("user_namespace")
async def pid_one_cannot_be_killed_read_or_limited(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        for script in (
            "cat /proc/1/environ", "ls /proc/1/fd/", "ls /proc/1/root/", "head -c1 /proc/1/mem", "readlink /proc/1/exe",
            "prlimit --pid 1 --nofile=1:1", "echo 1 > /proc/1/oom_score_adj",
        ):  # fmt: skip
            result = await shell(sandbox, script)
            require(result.exit_code != 0 and not result.stdout.data, (script, result))
        await shell(sandbox, "kill -9 1; kill -STOP 1; kill -TERM 1; kill -SEGV 1")
        require(await line(sandbox, "echo alive") == "alive")


@check("user_namespace")
async def no_user_inside_is_the_one_of_pid_one(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        before = await line(sandbox, "cut -d' ' -f19 /proc/1/stat; ionice -p 1")
        reached = await python(sandbox, _REACH)
        require(reached == "True\n", reached)
        require(await line(sandbox, "cut -d' ' -f19 /proc/1/stat; ionice -p 1") == before)


@check()
async def no_environment_of_the_host_is_visible(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        seen = await line(sandbox, "cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' | cut -d= -f1 | sort -u")
        require(set(seen.split()) <= {"PATH", "HOME", "LANG", "PWD", "SHLVL", "_", "OLDPWD"}, seen)


@check()
async def privileges_are_few_and_final(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        lines = await line(sandbox, "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status")
        status = dict(entry.split(":\t") for entry in lines.split("\n"))
        for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"):
            require(int(status[name], 16) & _FATAL_CAPABILITIES == 0, status)
        require(status["NoNewPrivs"] == "1" and status["Seccomp"] == "2", status)


@check("user_namespace")
async def root_inside_is_nobody_outside(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        outside = (await line(sandbox, "cat /proc/self/uid_map")).split()
        require(outside[0] == "0" and int(outside[1]) >= 65536, outside)


@check()
async def dangerous_system_calls_are_refused(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        answers = dict(entry.split() for entry in (await python(sandbox, _SYSCALLS)).splitlines())
        for name, reason in _ABSENT.items():
            require(answers.pop(name) == "ENOSYS", (name, reason))
        require(set(answers.values()) == {"EPERM"}, answers)


@check()
async def only_sockets_that_the_network_namespace_isolates_exist(substrate: Substrate) -> None:
    program = (
        "import socket\n"
        "for family, kind, proto in ((40, 1, 0), (38, 5, 0), (17, 3, 0), (16, 3, 15), (16, 3, 9)):\n"
        "  try: socket.socket(family, kind, proto); print('OPEN', family, proto)\n"
        "  except OSError: pass\n"
        "socket.socket(16, 3, 0); print('end')"
    )
    async with fresh(substrate) as sandbox:
        require(await python(sandbox, program) == "end\n", "vsock, alg, packet, uevent or audit")


@check()
async def the_network_is_only_localhost(substrate: Substrate) -> None:
    program = (
        "import socket, threading\n"
        "print(sorted(name for _, name in socket.if_nameindex()))\n"
        "for host in ('127.0.0.1', '169.254.169.254', '10.0.0.1', '172.17.0.1', '1.1.1.1'):\n"
        "  for port in (22, 53, 80, 2375, 6443, 50051):\n"
        "    s = socket.socket(); s.settimeout(0.3)\n"
        "    try: s.connect((host, port)); print('OPEN', host, port)\n"
        "    except OSError: pass\n"
        "server = socket.create_server(('127.0.0.1', 80))\n"
        "socket.create_connection(('localhost', 80)).send(b'x'); print(server.accept()[0].recv(1))\n"
    )
    async with fresh(substrate) as sandbox:
        require(await python(sandbox, program) == "['lo']\nb'x'\n")
        require(await line(sandbox, "awk 'NR > 1 && NF > 7' /proc/net/unix") == "", "named sockets of others")


@check()
async def mounts_and_devices_cannot_be_made(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        for script in (
            "mount -t tmpfs x /mnt", "mount --bind /etc /mnt", "umount /proc", "umount -l /usr", "unshare -Um true",
            "mknod /tmp/vda b 254 0", "mknod /tmp/mem c 1 1", "chroot / true", "nsenter -t 1 -m true",
            "hostname other", "sysctl -w kernel.core_pattern=x", "echo b > /proc/sysrq-trigger.x",
            "echo 1 > /proc/sys/kernel/panic", "ip link add x type dummy",
        ):  # fmt: skip
            require((await shell(sandbox, script)).exit_code != 0, script)


@check()
async def the_root_has_nothing_above_or_beneath(substrate: Substrate) -> None:
    program = (
        "import os\n"
        "for _ in range(50): os.chdir('..')\n"
        "print(sorted(set(os.listdir('.')) ^ set(os.listdir('/'))))\n"
        "try: os.mkdir('/tmp/esc'); inner = os.open('/', os.O_RDONLY); os.chroot('/tmp/esc')\n"
        "except OSError as error: print(error.errno)\n"
    )
    async with fresh(substrate) as sandbox:
        require(await python(sandbox, program) == "[]\n1\n")


@check("own_mounts")
async def only_what_a_sandbox_needs_is_mounted(substrate: Substrate) -> None:
    program = (
        "print(sorted({line.split()[4] for line in open('/proc/self/mountinfo')} - {'/', '/usr', '/dev', '/dev/pts', "
        "'/dev/shm', '/proc'} - {line.split()[4] for line in open('/proc/self/mountinfo') if ' /proc/' in line}))"
    )
    async with fresh(substrate) as sandbox:
        require(await python(sandbox, program) == "[]\n")


@check()
async def what_programs_do_not_need_of_the_host_reads_as_empty(substrate: Substrate) -> None:
    files = (
        "cmdline keys key-users modules interrupts kallsyms buddyinfo cgroups config.gz diskstats locks mdstat mtrr "
        "partitions schedstat softirqs swaps vmstat zoneinfo sys/kernel/random/boot_id"
    )
    async with fresh(substrate) as sandbox:
        told = (
            f'cd /proc; for f in {files}; do test -n "$(head -c1 $f 2>/dev/null | tr "\\0" 0)" && echo $f; done; true'
        )
        require(await line(sandbox, told) == "", await line(sandbox, told))
        require(await line(sandbox, "cd /proc; find bus fs irq pressure scsi -mindepth 1 2>/dev/null; true") == "")
        require(
            (await shell(sandbox, "touch /proc/fs/x /proc/bus/x /proc/irq/x")).exit_code != 0, "a mask can be written"
        )
        needed = "ps aux >/dev/null && uptime >/dev/null && free >/dev/null && nproc >/dev/null && top -bn1 >/dev/null"
        await line(sandbox, needed)


@check()
async def the_homes_and_temporary_folders_start_empty(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        require(
            await line(sandbox, "find /root /home /tmp /var/tmp /opt /srv /mnt /media /run -type f -o -type s") == ""
        )


@check()
async def programs_changed_by_one_sandbox_stay_whole_in_another(substrate: Substrate) -> None:
    async with fresh(substrate) as bad, fresh(substrate) as good:
        before = await line(good, "sha256sum < /usr/bin/env")
        await line(bad, "echo '#!/bin/false' > /usr/bin/env; rm /usr/bin/cat; touch /usr/bin/left /tmp/left /etc/left")
        require(await line(bad, "sha256sum < /usr/bin/env") != before, "the write was lost")
        require(await line(good, "sha256sum < /usr/bin/env") == before, "another sandbox changed our program")
        require(await line(good, "ls /usr/bin/left /tmp/left /etc/left 2>/dev/null | wc -l; cat /dev/null") == "0")
    async with fresh(substrate) as later:
        require(await line(later, "sha256sum < /usr/bin/env") == before, "a change outlived its sandbox")


@check()
async def sandboxes_share_no_processes_sockets_or_memory(substrate: Substrate) -> None:
    server = (
        '(exec -a marked sleep 500) & python3 -c "import socket,os,time\ns=socket.socket(socket.AF_UNIX);'
        "s.bind(chr(0)+'dsec-check');s.listen();os.fork() or time.sleep(300)\" & "
        "until grep -q dsec-check /proc/net/unix; do sleep 0.02; done; echo x > /dev/shm/mine; ipcmk -Q >/dev/null"
    )
    async with fresh(substrate) as first, fresh(substrate) as second:
        await line(first, server)
        seen = await line(
            second, "pgrep -fc '^marked'; grep -c dsec-check /proc/net/unix; ls /dev/shm; ipcs -q | grep -c 0x; true"
        )
        require(seen == "0\n0\n0", seen)


@check("user_namespace")
async def watches_taken_by_one_sandbox_are_there_for_another(substrate: Substrate) -> None:
    program = "import ctypes; print(ctypes.CDLL(None).inotify_init1(0) >= 0)"
    async with fresh(substrate) as bad, fresh(substrate) as good:
        taken = [entry.split() for entry in (await python(bad, _WATCHERS)).splitlines()]
        require([error for _, error in taken] == ["24"] * 4 and int(taken[0][0]) > 0, taken)
        require(await python(good, program) == "True\n", taken)


CHECKS: tuple[Check, ...] = (
    only_own_processes_are_visible,
    pid_one_cannot_be_killed_read_or_limited,
    no_user_inside_is_the_one_of_pid_one,
    no_environment_of_the_host_is_visible,
    privileges_are_few_and_final,
    root_inside_is_nobody_outside,
    dangerous_system_calls_are_refused,
    only_sockets_that_the_network_namespace_isolates_exist,
    the_network_is_only_localhost,
    mounts_and_devices_cannot_be_made,
    the_root_has_nothing_above_or_beneath,
    only_what_a_sandbox_needs_is_mounted,
    what_programs_do_not_need_of_the_host_reads_as_empty,
    the_homes_and_temporary_folders_start_empty,
    programs_changed_by_one_sandbox_stay_whole_in_another,
    sandboxes_share_no_processes_sockets_or_memory,
    watches_taken_by_one_sandbox_are_there_for_another,
)
