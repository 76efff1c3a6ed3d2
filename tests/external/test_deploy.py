"""The manifests below deploy/, by the programs and schemas of those that they are for: kubectl, Kubernetes, Compose."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
KUBERNETES = "1.31"
VARIABLE = re.compile(r"\$\{\w+(?::([-?])([^}]*))?\}")


def own_program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


@pytest.fixture(scope="module")
def manifests() -> str:
    """As `kubectl apply -k` would send them."""
    command = (own_program("kubectl"), "kustomize", str(DEPLOY / "kubernetes"))
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (made.returncode, made.stderr) == (0, "")
    return made.stdout


def validate(manifests: str, path: Path) -> subprocess.CompletedProcess[str]:
    path.write_text(manifests)
    command = (own_program("kubernetes-validate"), "-k", KUBERNETES, "--strict", str(path))
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_manifests_are_what_kubernetes_takes(manifests: str, tmp_path: Path) -> None:
    kinds = sorted(each["kind"] for each in yaml.safe_load_all(manifests))
    assert kinds == ["PersistentVolumeClaim", "Service", "Service", "StatefulSet", "StatefulSet"]
    checked = validate(manifests, tmp_path / "manifests.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    wrong = validate(manifests.replace("readinessProbe", "readyProbe"), tmp_path / "wrong.yaml")
    assert wrong.returncode == 1


def compose(text: str) -> Any:
    filled = VARIABLE.sub(lambda found: found[2] if found[1] == "-" else "filled", text)
    return PyCompose.from_json(json.dumps(yaml.safe_load(filled)))


def test_the_compose_file_is_one_of_the_compose_specification() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    project = compose(text)
    project.validate()
    assert sorted(project.service_names()) == ["postgres", "worker-a", "worker-b"]
    mistakes = [("stop_grace_period", "stop_grace"), ("service_healthy", "healthy"), ("- root:/srv", "- rot:/srv")]
    for right, wrong in mistakes:
        with pytest.raises(ValueError, match=r"stop_grace|healthy|rot"):
            compose(text.replace(right, wrong)).validate()
