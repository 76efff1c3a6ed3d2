"""The programs and commands in the packages' own README files run as they stand."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def blocks(path: str) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / path).read_text(), re.MULTILINE | re.DOTALL)


def run_all(dsec: Any, place: Path, path: str) -> list[str]:
    """The output of the Python blocks as one program, then of each command."""
    found = blocks(path)
    assert {language for language, _ in found} == {"python", ""}
    (place / "program.py").write_text("".join(text for language, text in found if language == "python"))
    outputs = [dsec.done("program.py", command=sys.executable, cwd=place).out]
    for _, text in (block for block in found if not block[0]):
        for line in text.splitlines():
            command = line.split("  #")[0].replace("python -m", f"{sys.executable} -m")
            outputs.append(dsec.done("-c", command, command="bash", cwd=place).out)
    return outputs


def test_the_log_does_what_its_readme_shows(dsec: Any, tmp_path: Path) -> None:
    program, records, verdict, stats, request = run_all(dsec, tmp_path, "wal/README.md")
    assert re.search(r"^100 records, [1-9]\d? syncs$", program, re.MULTILINE)
    assert "100 7 b'record 99'" in program
    assert "[10, 11, 12] acknowledged open" in program
    assert "RetentionReport(dropped=()" in program
    assert len(records.splitlines()) == 100
    assert verdict.startswith("ok: 100 records")
    assert '"acknowledged": 1' in stats
    assert len(request.splitlines()) == 6


def test_the_language_does_what_its_readme_shows(dsec: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to(ROOT / "rollout/engines/embedded/checkpoint/tokenizer.json")
    program, encoded, parsed = run_all(dsec, tmp_path, "toolcall_dsl/README.md")
    lines = program.splitlines()
    assert "Need the forecast. weather {'city': 'Seoul', 'days': 'three'}" in lines
    assert 'days: expected integer; found "three"' in lines
    assert '{"city": "Seoul", "days": "three"} True' in lines
    assert re.search(r"^\[\('SAMPLED_THINK', \d+\), \('SAMPLED_TEXT', \d+\)\]\n\[.*\] False$", program, re.MULTILINE)
    assert re.search(r"^\d+ ids, opened by <｜begin▁of▁sentence｜>$", program, re.MULTILINE)
    assert lines[-2:] == ["<｜User｜>And tomorrow?<｜Assistant｜><think>", "question <｜read_url｜>"]
    assert encoded == "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜></think>"
    assert json.loads(parsed) == {"reasoning": "Easy.", "content": "It is 4.", "tool_calls": [], "error": None}
