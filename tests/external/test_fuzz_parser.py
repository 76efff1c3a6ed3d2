"""The coverage-guided fuzz target of the parser, for a bounded number of runs.  Needs PyPI's atheris."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNS = 5000


def test_no_run_of_the_fuzzer_breaks_a_law(tmp_path: Path) -> None:
    command = [sys.executable, "tests/fuzz/fuzz_parser.py", "--corpus", str(tmp_path), f"-runs={RUNS}", "-seed=1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "Instrumenting toolcall_dsl.scanner" in ended.stderr
    assert f"Done {RUNS} runs" in ended.stderr
