"""What an image says of its commands holds for each of them, whoever runs it, in every sandbox that comes of it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsec import Sandbox

PASSWD = b"root:x:0:0::/root:/bin/bash\njoe:x:1234:1235::/home/joe:/bin/bash\n"
GROUP = b"root:x:0:\nbuild:x:1300:\n"
SAYS = "echo $(pwd) $(id -u):$(id -g) $A-$B"


def write_layout(root: Path, name: str, **run: Any) -> Path:
    """An OCI layout of one layer that goes over the host's own programs."""
    layer = io.BytesIO()
    with tarfile.TarFile(fileobj=layer, mode="w") as archive:
        for path, content in {"etc/passwd": PASSWD, "etc/group": GROUP, "srv/app/main": b"1"}.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    blobs = root / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    laid = put(layer.getvalue(), "layer.v1.tar")
    config = {"architecture": "amd64", "os": "linux", "config": run,
              "rootfs": {"type": "layers", "diff_ids": [laid["digest"]]}}  # fmt: skip
    manifest = {"schemaVersion": 2, "config": put(json.dumps(config).encode(), "config.v1+json"), "layers": [laid]}
    listed = put(json.dumps(manifest).encode(), "manifest.v1+json")
    listed["annotations"] = {"org.opencontainers.image.ref.name": name}
    (root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [listed]}))
    (root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return root


@pytest.fixture
def edge(dsec: Any, edge_process: Any, tmp_path: Path) -> Iterator[Any]:
    edge = edge_process(dsec, tmp_path / "edge", DSEC_IMAGES_DIRECTORY=str(tmp_path / "images"))
    layout = write_layout(
        tmp_path / "layout", "app:1", Env=["A=image", "B=image", "PATH=/usr/bin:/bin"], WorkingDir="/srv/app",
        User="joe:build", Entrypoint=["/bin/false"], Cmd=["nothing"],
    )  # fmt: skip
    assert edge.done("image", "import", layout).startswith("app:1\n")
    yield edge
    edge.stop()


def said(edge: Any, sandbox: str, *options: str) -> str:
    text: str = edge.done("exec", sandbox, *options, "--", "sh", "-c", SAYS).strip()
    return text


def test_a_command_gets_what_the_image_says_and_its_own_word_goes_before(edge: Any) -> None:
    sandbox = edge.done("create", "--layer", "app:1").strip()
    assert said(edge, sandbox, "--key", "k") == "/srv/app 1234:1300 image-image"
    assert said(edge, sandbox, "-e", "B=mine", "-w", "/", "-u", "root") == "/ 0:0 image-mine"
    assert edge.done("exec", sandbox, "--", "sh", "-c", "echo $PATH $HOME").split() == ["/usr/bin:/bin", "/home/joe"]
    asked = json.loads(edge.done("trajectory", sandbox, "--json").splitlines()[0])
    assert (asked["cwd"], asked["env"], asked["user"]) == ("", {}, "")
    defaults = edge("create", "--layer", "app:1", "-e", "B=create", "-w", "/tmp", "--json").json()["spec"]["defaults"]
    assert defaults == {
        "env": {"A": "image", "B": "create", "PATH": "/usr/bin:/bin"}, "cwd": "/tmp", "user": "joe:build",
    }  # fmt: skip


def test_forks_branches_and_the_next_edge_keep_it_though_the_name_is_anothers_now(edge: Any, tmp_path: Path) -> None:
    sandbox = edge.done("create", "--layer", "app:1", "-e", "B=create").strip()
    wanted = "/srv/app 1234:1300 image-create"
    assert said(edge, sandbox, "--key", "k") == wanted
    edge.done("image", "import", write_layout(tmp_path / "other", "app:1", Env=["A=other"]))
    others = [edge.done("fork", sandbox).strip(), edge.done("fork", sandbox, "--after", "k").strip()]
    edge.kill()
    edge.start()
    assert [said(edge, one) for one in (sandbox, *others)] == [wanted] * 3
    assert said(edge, sandbox, "--key", "k") == wanted


def test_a_snapshot_with_a_name_is_an_image_that_goes_on_and_runs_commands_alike(edge: Any) -> None:
    sandbox = edge.done("create", "--layer", "app:1", "-e", "B=create").strip()
    edge.done("exec", sandbox, "-u", "root", "--", "sh", "-c", "echo mine > /srv/app/mine")
    layer = edge.done("snapshot", sandbox, "--tag", "mine:1").strip()
    edge.done("rm", sandbox)
    edge.done("image", "gc")
    made = edge("image", "inspect", "mine:1").json()
    assert made["image"]["layers"][0] == layer
    assert made["image"]["source"] == f"snapshot of {sandbox}"
    for option in ("--base", "--layer"):
        again = edge.done("create", option, "mine:1").strip()
        assert said(edge, again) == "/srv/app 1234:1300 image-create"
    assert edge.done("exec", again, "--", "cat", "mine", "main") == "mine\n1"
    refused = edge("snapshot", again, "--tag", "../x")
    assert (refused.code, "no image name" in refused.err) == (2, True)


def test_a_python_program_gets_the_same_and_files_are_roots(edge: Any) -> None:
    with Sandbox.create(layers=["app:1"], envs={"B": "python"}, url=edge.url) as sandbox:
        assert sandbox.commands.run(SAYS).stdout.strip() == "/srv/app 1234:1300 image-python"
        with_envs = Sandbox.connect(sandbox.id, url=edge.url, envs={"A": "mine"})
        assert with_envs.commands.run(SAYS).stdout.strip() == "/srv/app 1234:1300 mine-python"
        with_envs.close()
        sandbox.files.write("/srv/app/main", b"2")
        assert sandbox.files.stat("/srv/app/main").uid == 0
        assert sandbox.commands.run("echo 3 > main").exit_code != 0


def test_an_image_that_says_what_cannot_be_is_refused(edge: Any, tmp_path: Path) -> None:
    for number, (run, why) in enumerate((
        ({"WorkingDir": "here"}, "'here' is not an absolute path"),
        ({"Env": ["=x"]}, "cannot be the name"),
        ({"Env": [f"V{name}={'x' * 100_000}" for name in range(3)]}, "more than 262144"),
        ({"Cmd": ["x" * 300_000]}, "more than 262144"),
    )):  # fmt: skip
        refused = edge("image", "import", write_layout(tmp_path / f"bad{number}", "bad:1", **run))
        assert (refused.code, why in refused.err) == (2, True)
    assert len(edge("image", "ls", "--json").json()["images"]) == 1
