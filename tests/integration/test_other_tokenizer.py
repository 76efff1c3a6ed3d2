"""A run with another tokenizer than the embedded one's: what `dsec` prints about it can be pasted, and works."""

import json
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT

WAY_OUT = "name the folder of that model's tokenizer.json (--tokenizer DIR, or DSEC_TOKENIZER)"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The embedded vocabulary in another file."""
    folder = tmp_path / f"a model {'of a long name ' * 6}"
    folder.mkdir()
    definition = json.loads((DEFAULT_CHECKPOINT / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(definition, indent=3))
    return folder


def pasted(dsec: Any, line: str) -> Any:
    """What a shell makes of a line."""
    program, *arguments = shlex.split(line)
    assert Path(program).name == "dsec"
    return dsec.done(*arguments)


def wait_for_a_rollout(process: subprocess.Popen[str], run: Path) -> None:
    while b"rollout_opened" not in b"".join(path.read_bytes() for path in run.glob("wal/*.wal")):
        assert process.poll() is None, process.communicate()


def test_the_printed_lines_name_the_tokenizer_and_finish_and_show_the_run(
    dsec: Any, tasks: Path, model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = dsec.start("run", tasks, "--tokenizer", model, "--out", run)
    wait_for_a_rollout(process, run)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    ended = pasted(dsec, err.partition("finish with: ")[2])
    lines = [line.strip() for line in ended.out.splitlines()]
    (again,) = (line for line in lines if " run --resume " in line)
    assert "it had ended already" in pasted(dsec, again).out
    (look,) = (line for line in lines if " show " in line)
    assert "solved" in pasted(dsec, look).out or "reward" in pasted(dsec, look).out
    (one,) = (line for line in pasted(dsec, look.rpartition(" ")[0]).out.splitlines() if "turn by turn: " in line)
    assert shlex.split(one)[-2:] == ["--tokenizer", str(model)]
    shown = dsec.done("show", run, "--json", "--tokenizer", model).lines()
    assert {record["finish_reason"] for record in shown} <= {"STOP", "TURN_LIMIT", "LENGTH_TURN", "LENGTH_CONTEXT"}
    assert "4 rollouts written" in dsec.done("export", run, "--tokenizer", model).out


def test_who_reads_a_log_without_its_tokenizer_is_told_how_to_name_it(
    dsec: Any, make_task: Any, model: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    run, task = root / "run", make_task(tmp_path / "task")
    dsec.done("run", task, "--agent", "nop", "--tokenizer", model, "--out", run)
    readers: list[tuple[object, ...]] = [("show", run), ("export", run), ("index", "rebuild", root)]
    for asked in (*readers, ("run", "--resume", "--out", run)):
        refused = dsec(*asked)
        assert (refused.code, refused.out) == (3, ""), asked
        assert WAY_OUT in refused.err
        dsec.done(*asked, env={"DSEC_TOKENIZER": str(model)})
        dsec.done(*asked, "--tokenizer", model)
