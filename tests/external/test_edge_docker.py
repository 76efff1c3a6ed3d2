"""An Edge over Docker Engine, from the command line: its sandboxes outlive it, as containers of our own making do."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import docker

DSEC = Path(sys.executable).parent / "dsec"


@contextlib.contextmanager
def serving(directory: Path, env: dict[str, str], *options: str) -> Iterator[str]:
    """A served Edge; gives its ready line.  Killed at the end of the block, with no chance to tidy up."""
    command = [
        DSEC,
        "edge",
        "serve",
        "--substrate",
        "docker",
        "--directory",
        directory,
        "--listen",
        env["DSEC_API_URL"],
    ]
    command += options
    with subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE) as edge:
        try:
            yield edge.stdout.readline()
        finally:
            (edge.terminate if options else edge.kill)()


def test_a_killed_edge_leaves_its_docker_sandboxes_to_the_next(docker_url: str, tmp_path: Path) -> None:
    url = f"unix:{tmp_path}/edge.sock"
    env = os.environ | {"DSEC_API_URL": url, "DSEC_DOCKER_URL": docker_url}

    def dsec(*arguments: str) -> str:
        ran = subprocess.run([DSEC, *arguments], env=env, text=True, check=False, capture_output=True)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    with serving(tmp_path / "state", env) as ready:
        assert "0 sandboxes taken up" in ready
        sandbox = dsec("create").strip()
        dsec("exec", sandbox, "--", "bash", "-c", "sleep 600 & echo $! > /root/pid; seq 100000 > /root/numbers")
    with serving(tmp_path / "state", env, "--destroy-on-exit") as ready:
        assert "1 sandbox taken up" in ready
        script = "kill -0 $(cat /root/pid) && wc -l < /root/numbers; seq 3000000"
        answer = dsec("exec", sandbox, "--", "bash", "-c", script)
        assert answer.startswith("100000\n1\n2\n")
        assert answer.endswith("\n3000000\n")  # more than is kept in memory: it lay on disk
        dsec("rm", sandbox)


def test_images_of_docker_are_bases_by_name_and_forks_go_on(docker_url: str, tmp_path: Path) -> None:
    env = os.environ | {"DSEC_API_URL": f"unix:{tmp_path}/edge.sock", "DSEC_DOCKER_URL": docker_url}

    def dsec(*arguments: str) -> str:
        ran = subprocess.run([DSEC, *arguments], env=env, text=True, check=False, capture_output=True)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    client = docker.APIClient(base_url=docker_url, version="auto")
    with serving(tmp_path / "state", env, "--destroy-on-exit"):
        (base,) = client.images("dsec-host")
        container = client.create_container(base["Id"], ["true"])["Id"]
        client.commit(container, "dsec-test/named", "1", changes=["ENV A=b", "WORKDIR /srv"])
        client.remove_container(container)
        sandbox = dsec("create", "--base", "dsec-test/named:1")
        assert dsec("exec", sandbox, "--", "bash", "-c", "echo $A > f; pwd") == "/srv"
        forks = dsec("fork", sandbox, "--count", "2").split()
        for fork in forks:
            assert dsec("exec", fork, "--", "bash", "-c", f"cat f; echo {fork} > f") == "b"
        (again,) = dsec("fork", forks[0]).split()
        assert dsec("exec", again, "--", "cat", "f") == forks[0]
        dsec("rm", sandbox, again, *forks)
    client.remove_image("dsec-test/named:1")
    client.close()
