"""The base every sandbox starts from, apart from /usr: an /etc of our own and empty directories.

Nothing here is copied from the host except symbolic links that point into /usr (alternatives such as
`awk`), so that no configuration, account, key or name of the host is visible inside.

See: dsec/native/protocol.h (the skeleton's layout), docs/threat_model.md.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from dsec.edge.native_wire import encode_string, encode_u32

MERGED_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_DIRECTORIES = {
    "dev": 0o755, "etc": 0o755, "etc/alternatives": 0o755, "etc/pam.d": 0o755, "home": 0o755, "media": 0o755,
    "mnt": 0o755, "opt": 0o755, "proc": 0o555, "root": 0o700, "run": 0o755, "run/lock": 0o1777, "srv": 0o755,
    "sys": 0o555, "tmp": 0o1777, "usr": 0o755, "var": 0o755, "var/cache": 0o755, "var/lib": 0o755,
    "var/log": 0o755, "var/mail": 0o2775, "var/spool": 0o755, "var/tmp": 0o1777,
}  # fmt: skip
_LINKS = {
    "etc/mtab": "/proc/self/mounts",
    "etc/os-release": "../usr/lib/os-release",
    "var/lock": "/run/lock",
    "var/run": "/run",
}
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/bash\n"
    "daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\ndaemon:x:1:\ntty:x:5:\nmail:x:8:\nusers:x:100:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1\tlocalhost\n127.0.1.1\tsandbox\n::1\tlocalhost ip6-localhost ip6-loopback\n",
    "etc/hostname": "sandbox\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files\n"
    "services: files\nprotocols: files\n",
    "etc/resolv.conf": "",
    "etc/host.conf": "multi on\n",
    "etc/fstab": "",
    "etc/shells": "/bin/sh\n/bin/bash\n",
    "etc/ld.so.conf": "/usr/local/lib\n",
    "etc/profile": "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\nexport PATH\n",
    "etc/login.defs": "UMASK 022\nENV_PATH PATH=/usr/local/bin:/usr/bin:/bin\n",
    **dict.fromkeys(
        ("etc/pam.d/other", "etc/pam.d/su", "etc/pam.d/runuser"),
        "auth sufficient pam_rootok.so\nauth required pam_deny.so\n"
        "account required pam_permit.so\nsession required pam_permit.so\n",
    ),
    "etc/protocols": "ip 0 IP\nicmp 1 ICMP\ntcp 6 TCP\nudp 17 UDP\nipv6-icmp 58 IPv6-ICMP\n",
    "etc/services": "ftp 21/tcp\nssh 22/tcp\ntelnet 23/tcp\nsmtp 25/tcp\ndomain 53/tcp\ndomain 53/udp\n"
    "http 80/tcp www\npop3 110/tcp\nntp 123/udp\nimap2 143/tcp imap\nhttps 443/tcp\nhttp-alt 8080/tcp\n",
}


class Entry(msgspec.Struct, frozen=True):
    """A directory (`d`), file (`f`) or symbolic link (`l`); `content` is a link's target."""

    kind: str
    path: str
    mode: int = 0o777
    content: str = ""


def entries(host_root: Path = Path("/")) -> list[Entry]:
    """The skeleton, parents first.  Reads the host's merged-/usr links and alternatives, nothing else."""
    made = [Entry("d", path, mode) for path, mode in _DIRECTORIES.items()]
    made += [Entry("l", path, content=target) for path, target in _LINKS.items()]
    made += [Entry("f", path, 0o644, content) for path, content in _FILES.items()]
    made.append(Entry("f", "etc/shadow", 0o600, "root:*:20000:0:99999:7:::\nnobody:*:20000:0:99999:7:::\n"))
    for name in MERGED_LINKS:
        if (host_root / name).is_symlink():
            made.append(Entry("l", name, content=f"usr/{name}"))
    alternatives = host_root / "etc/alternatives"
    if alternatives.is_dir():
        for link in sorted(alternatives.iterdir()):
            target = os.readlink(link) if link.is_symlink() else ""
            if target.startswith("/usr/") and not link.name.endswith(".gz") and ".." not in target + link.name:
                made.append(Entry("l", f"etc/alternatives/{link.name}", content=target))
    return made


def encode(skeleton: list[Entry]) -> bytes:
    """The skeleton as the spawner unpacks it."""
    return b"".join(
        encode_u32(ord(entry.kind), entry.mode) + encode_string(entry.path) + encode_string(entry.content)
        for entry in skeleton
    )
