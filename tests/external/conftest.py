"""A Docker daemon of our own for the tests that need one: no network, all of it below one directory and one cgroup."""

import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

STOP_S = 60


@pytest.fixture(scope="session")
def docker_url() -> Iterator[str]:
    """Start dockerd and stop it; gives its address.  Skipped where it is not installed; CI installs it."""
    if shutil.which("dockerd") is None:
        pytest.skip("dockerd is not installed (Debian: apt-get install docker.io)")
    place = Path(tempfile.mkdtemp(prefix="dsec-dockerd-"))  # short: sockets lie below it
    url = f"unix://{place}/sock"
    command = ["dockerd", "--iptables=false", "--ip-forward=false", "--ip-masq=false", "--bridge=none"]
    command += [f"--data-root={place}/root", f"--exec-root={place}/run", f"--pidfile={place}/pid", "-H", url]
    command += [f"--cgroup-parent=/{place.name}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as daemon:
        try:
            said = []
            while "API listen on" not in "".join(said[-1:]):
                said.append(daemon.stdout.readline())
                assert said[-1], "".join(said)
            drain = threading.Thread(target=daemon.stdout.read)
            drain.start()
            yield url
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(STOP_S)
            drain.join(STOP_S)
    left = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in sorted((mount for mount in left if mount.startswith(str(place))), reverse=True):
        subprocess.run(["umount", "-l", mount], check=True)
    shutil.rmtree(place)
    for parent in Path("/sys/fs/cgroup").glob(f"**/{place.name}"):
        parent.rmdir()
