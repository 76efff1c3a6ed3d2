"""mini-swe-agent (PyPI), as its command line runs it, solves a bundled task against the service.

The embedded model knows two tools of its own and no shell agent's manners, so the double speaks in its place; prompts,
calls, results and reasoning go through the service as any model's would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from rollout.bench.tasks import BUNDLED
from rollout.main import load_tokenizer
from rollout.testing import Reply, ScriptedEngine

TASK = BUNDLED / "append-1-000"
LINE = (TASK / "solution/solve.sh").read_text().splitlines()[-1]
REPLIES = [
    Reply("I look around.", "What is there?", [("bash", {"command": "ls"}), ("bash", {"command": "cat rmtree.txt"})]),
    Reply("", "I append the line.", [("bash", {"command": LINE})]),
    Reply("Done.", "That is it.", [("bash", {"command": "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"})]),
]


def test_it_solves_a_task(serve: Any, tmp_path: Path) -> None:
    app, logs = tmp_path / "app", tmp_path / "logs"
    subprocess.run(["cp", "-r", TASK / "environment/files", app], check=True)
    engine = ScriptedEngine(load_tokenizer(), lambda _session, turn: REPLIES[turn], chunk_tokens_count=8)
    with serve(engine, "secret", context_tokens_count_max=1 << 16) as served:
        env = os.environ | {
            "OPENAI_API_BASE": f"{served.url}/v1",
            "OPENAI_API_KEY": "secret",
            "MSWEA_COST_TRACKING": "ignore_errors",
            "MSWEA_CONFIGURED": "true",
            "MSWEA_GLOBAL_CONFIG_DIR": str(tmp_path / "config"),
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        }
        command: list[Any] = [Path(sys.executable).parent / "mini", "--model", "openai/scripted", "--yolo"]
        command += ["--exit-immediately", "--output", tmp_path / "trajectory.json"]
        command += ["--task", (TASK / "instruction.md").read_text()]
        ran = subprocess.run(command, cwd=app, env=env, text=True, capture_output=True, check=False)
        assert ran.returncode == 0, ran.stderr[-4000:]
        states = served.ended
    told = json.loads((tmp_path / "trajectory.json").read_text())
    assert (told["info"]["exit_status"], told["info"]["model_stats"]["api_calls"]) == ("Submitted", len(REPLIES))
    assert [state.turns[0].finish for state in states] == ["TOOL_CALLS"] * len(REPLIES)
    for before, after in pairwise(states):  # nothing was decoded and encoded into something else
        assert after.token_ids[: len(before.token_ids)] == before.token_ids
    places = {"APP_DIR": str(app), "TESTS_DIR": str(TASK / "tests"), "LOGS_DIR": str(logs)}
    subprocess.run(["bash", TASK / "tests/test.sh"], env=os.environ | places, check=True)
    assert (logs / "verifier/reward.txt").read_text() == "1\n"
