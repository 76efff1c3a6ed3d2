"""Workers, Edge, sandboxes, clients and database are killed at random under rollouts, and nobody can tell afterwards.

STORM_ROLLOUTS, STORM_KILLS and STORM_SEED make it another storm (docs/serving.md, "Faults").
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROLLOUTS, KILLS, SEED = (
    os.environ.get(f"STORM_{name}", usual) for name, usual in (("ROLLOUTS", "24"), ("KILLS", "12"), ("SEED", "1"))
)


@pytest.mark.usefixtures("own_cgroups")
def test_rollouts_end_in_a_storm_of_kills_as_they_do_without() -> None:
    script = [sys.executable, str(ROOT / "benchmarks/fault_storm.py"), "--rollouts", ROLLOUTS, "--kills", KILLS]
    ran = subprocess.run([*script, "--seed", SEED, "--json"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    figures = json.loads(ran.stdout)
    assert figures["problems"] == []
    assert figures["rollouts"] == figures["equal_to_quiet"] == int(ROLLOUTS)
    assert (figures["tokens_drawn_twice"], figures["commands_run_twice"], figures["silent_holes"]) == (0, 0, 0)
    assert min(figures["kills_by_kind"].values()) > 0
    assert figures["attempts_max"] > 1
