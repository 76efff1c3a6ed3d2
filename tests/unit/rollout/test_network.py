"""What a task asks of the network, phase by phase, and what an operator lets it have."""

import pytest

from dsec.types import NetworkPolicy, NetworkRule
from rollout.bench.task_toml import parse_task_toml
from rollout.config import RolloutConfig
from rollout.environment.network import PUBLIC, Networks, parse_rules, phase_of, refusals

HUB = parse_rules(["hub.example:443"])


def asked(toml: str) -> Networks:
    return parse_task_toml(toml.encode()).networks


def test_a_task_that_says_nothing_has_no_network() -> None:
    assert asked("") == Networks()
    assert asked("").are_off


def test_agent_and_verifier_have_the_network_of_the_environment_unless_they_say_otherwise() -> None:
    hub = '[environment]\nnetwork_mode = "allowlist"\nallowed_hosts = ["hub.example:443"]\n'
    assert asked(hub) == Networks(setup=HUB, agent=HUB, verifier=HUB)
    closed = asked(f'{hub}[agent]\nnetwork_mode = "no-network"\n[verifier]\nnetwork_mode = "public"\n')
    assert closed == Networks(setup=HUB, verifier=PUBLIC)


def test_an_allowlist_of_nothing_is_no_network() -> None:
    assert asked('[environment]\nnetwork_mode = "public"\n[agent]\nnetwork_mode = "allowlist"\n').agent.rules == ()


@pytest.mark.parametrize(
    ("key", "phase"),
    [
        ("setup/0/0", "setup"),
        ("setup/1/12", "setup"),
        ("call/0/bash", "agent"),
        ("solution/3", "agent"),
        ("judge/0/0", "agent"),
        ("judge/0/1", "verifier"),
        ("judge/10/10", "verifier"),
    ],
)
def test_the_phase_of_a_command_follows_from_its_key(key: str, phase: str) -> None:
    assert phase_of(key) == phase


def test_only_what_could_reach_nothing_and_the_set_up_may_be_run_again_elsewhere() -> None:
    everywhere = Networks(setup=HUB, agent=HUB, verifier=HUB)
    assert [key for key in ("setup/0/1", "call/0/bash", "judge/0/3") if everywhere.may_repeat(key)] == ["setup/0/1"]
    assert Networks(setup=HUB, verifier=HUB).may_repeat("call/0/bash")


def test_nothing_is_allowed_that_the_operator_did_not_say() -> None:
    config = RolloutConfig(setup_network="hub.example:443,80 10.0.0.0/8:8080", verifier_network="public")
    assert not list(refusals(Networks(setup=HUB, verifier=PUBLIC), config.networks))
    refused = list(refusals(Networks(setup=PUBLIC, agent=HUB), config.networks))
    way_out = "not allowed here: whoever runs this service can allow it with"
    assert refused == [
        f"the setup network: *, 0.0.0.0/0, [::/0]: {way_out} DSEC_SETUP_NETWORK",
        f"the agent network: hub.example:443: {way_out} DSEC_AGENT_NETWORK",
    ]
    guarded = NetworkPolicy(rules=(NetworkRule(cidr="127.0.0.1/32"),))
    assert list(refusals(Networks(verifier=guarded), config.networks))


@pytest.mark.parametrize("text", ["a:b", "http://a.example", "a.example:70000"])
def test_an_operators_rule_that_makes_no_sense_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(ValueError, match="agent_network"):
        RolloutConfig(agent_network=text)
