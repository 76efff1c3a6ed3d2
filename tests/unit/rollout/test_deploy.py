"""The manifests below deploy/ start workers as the command line and its settings know them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rollout.commands.serve import serve
from rollout.config import WorkerConfig

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"


def documents() -> list[Any]:
    texts = [path.read_text() for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))]
    return [document for text in texts for document in yaml.safe_load_all(text)]


def compose() -> Any:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def pod() -> Any:
    (found,) = (each for each in documents() if each.get("metadata", {}).get("name") == "dsec-worker")
    return found["spec"]["template"]["spec"]


COMMANDS = {
    **{name: each["command"] for name, each in compose()["services"].items() if name.startswith("worker")},
    "kubernetes": pod()["containers"][0]["args"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_worker_is_started_with_options_that_there_are(name: str) -> None:
    program, command, *arguments = COMMANDS[name]
    assert (program, command) == ("dsec", "serve")
    given = serve.make_context("serve", list(arguments)).params
    assert (given["root"], given["listen"]) == (Path("/srv/rollouts"), "0.0.0.0:7710")
    assert given["advertise"].endswith(":7710")


def test_a_worker_that_others_reach_has_a_token() -> None:
    worker = next(each for name, each in compose()["services"].items() if name.startswith("worker"))
    assert "DSEC_ROLLOUT_KEY" in worker["environment"]
    assert "DSEC_ROLLOUT_KEY" in {each["name"] for each in pod()["containers"][0]["env"]}


def test_a_password_may_hold_what_a_url_may_not() -> None:
    worker = compose()["services"]["worker-a"]["environment"]
    of_pods = {each["name"]: each.get("value", "") for each in pod()["containers"][0]["env"]}
    for given in (worker, of_pods):
        assert "PGPASSWORD" in given
        assert "PASSWORD" not in given["DSEC_INDEX_URL"]


def test_a_supervisor_waits_longer_than_a_worker_takes_to_stop() -> None:
    grace_s = WorkerConfig.model_fields["grace_s"].default
    assert grace_s < 45
    assert {each["stop_grace_period"] for n, each in compose()["services"].items() if n != "postgres"} == {"45s"}
    assert pod()["terminationGracePeriodSeconds"] == 45


def test_what_the_manifests_name_of_each_other_is_there() -> None:
    there = {(each["kind"], each["metadata"]["name"]) for each in documents() if "metadata" in each}
    for each in documents():
        if each["kind"] == "StatefulSet":
            assert ("Service", each["spec"]["serviceName"]) in there
            labels = each["spec"]["template"]["metadata"]["labels"]
            assert each["spec"]["selector"]["matchLabels"] == labels
    (kustomization,) = (each for each in documents() if each["kind"] == "Kustomization")
    assert [name for name in kustomization["resources"] if not (DEPLOY / "kubernetes" / name).is_file()] == []
    assert ("PersistentVolumeClaim", "dsec-root") in there
