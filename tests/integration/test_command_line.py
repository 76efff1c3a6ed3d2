"""The command line as a user has it: run, show, log, gc and doctor, each in a process of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import wal
from rollout import journal
from rollout.events import JobSubmitted
from rollout.main import load_tokenizer
from rollout.modes import limits_of
from rollout.request import Thinking

KEYS = ["tasks", "rollouts", "solved", "tokens", "per_task", "wall_s"]
NONE = ["tokens_regenerated", "commands_replayed", "commands_run_twice", "infra_failures"]
SAME_RUN = ("--group-size", 2, "--temperature", 1, "--seed", 3, "--turns-max", 6)
HIGHEST = "Reasoning Effort: Absolute maximum"


def digest(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir() if p.suffix == ".wal"}


def test_the_summary_counts_what_the_trajectories_say(dsec: Any, finished: Path) -> None:
    summary, records = json.loads((finished / "summary.json").read_text()), dsec.show(finished)
    assert [key for key in KEYS + NONE if key not in summary] == []
    assert (summary["tasks"], summary["rollouts"], summary["finished"]) == (4, 8, 8)
    assert summary["solved"] == sum(record["reward"]["value"] == 1 for record in records.values())
    assert summary["tokens"] == sum(record["tokens_sampled"] for record in records.values()) > 0
    assert summary["turns"] == sum(len(record["turns"]) for record in records.values())
    assert summary["tool_calls"] == sum(len(record["tool_calls"]) for record in records.values()) > 0
    assert [summary[key] for key in NONE] == [0, 0, 0, 0]
    assert [row["task"] for row in summary["per_task"]] == ["bug-5-000", "copy-5-000", "sort-5-000", "unclear"]
    for row in summary["per_task"]:
        members = [record for record in records.values() if record["task"] == row["task"]]
        assert row["rollouts"] == row["finished"] == len(members) == sum(row["finish_reasons"].values()) == 2
        assert row["reward_mean"] == sum(record["reward"]["value"] for record in members) / 2
        assert row["tokens"] == sum(record["tokens_sampled"] for record in members)


def test_a_later_turn_computes_no_token_that_an_earlier_one_went_through(dsec: Any, finished: Path) -> None:
    for record in dsec.show(finished).values():
        turns = record["turns"]
        gone_through = sum(turn["start"] + turn["length"] - 1 for turn in turns[:-1])
        assert record["timing"]["cached_tokens_count"] >= gone_through


def test_a_trajectory_is_complete_and_aligned_to_its_tokens(dsec: Any, finished: Path) -> None:
    for record in dsec.show(finished).values():
        ids, spans, logprobs = record["token_ids"], record["spans"], record["logprobs"]
        assert [span["start"] for span in spans] == [sum(s["length"] for s in spans[:n]) for n in range(len(spans))]
        assert sum(span["length"] for span in spans) == len(ids) == len(logprobs)
        for span in spans:
            values = logprobs[span["start"] : span["start"] + span["length"]]
            assert [value for value in values if (value is not None and value <= 0) != span["trainable"]] == []
        assert sum(value is not None for value in logprobs) == record["tokens_sampled"]
        forced = sum(span["length"] for span in spans if span["kind"] == "FORCED")
        assert sum(turn["length"] for turn in record["turns"]) == record["tokens_sampled"] + forced
        for call in record["tool_calls"]:
            assert call["name"] in ("bash", "edit")
            assert isinstance(call["exit"], int)
        assert record["reward"]["value"] in (0, 1)
        assert record["finish_reason"] in ("STOP", "TURN_LIMIT", "LENGTH_TURN", "LENGTH_CONTEXT")


def test_the_arrow_file_says_what_show_says(dsec: Any, finished: Path) -> None:
    with pa.memory_map(str(finished / "trajectories.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    records = dsec.show(finished)
    assert table.num_rows == len(records) == 8
    for row in table.to_pylist():
        record = records[row["rollout_id"]]
        assert row.keys() == record.keys()
        for name in ("token_ids", "spans", "policy_versions", "turns", "finish_reason", "timing", "wal"):
            assert row[name] == record[name]
        assert row["logprobs"] == pytest.approx(record["logprobs"], abs=1e-5)
        assert json.loads(row["reward"].pop("components")) == record["reward"].pop("components")
        assert row["reward"] == record["reward"]


def test_one_seed_gives_the_same_tokens_at_every_concurrency(
    dsec: Any, tasks: Path, finished: Path, tmp_path: Path
) -> None:
    dsec.done("run", tasks, "--out", tmp_path / "run", *SAME_RUN, "--concurrency", 1)
    alone, together = dsec.show(tmp_path / "run"), dsec.show(finished)
    assert {name: r["token_ids"] for name, r in alone.items()} == {name: r["token_ids"] for name, r in together.items()}
    assert [r["logprobs"] for r in alone.values()] == [r["logprobs"] for r in together.values()]


def test_every_rollout_that_runs_at_once_can_have_a_sandbox(dsec: Any, tmp_path: Path) -> None:
    """Also beyond the number of sandboxes and of open files that is usual by default."""
    program = """if True:
        import asyncio, sys
        from pathlib import Path
        from dsec.types import Command, SandboxSpec
        from rollout.config import RolloutConfig
        from rollout.main import make_service

        async def main():
            substrate = make_service(Path(sys.argv[1]), RolloutConfig(concurrency=300)).substrate
            await substrate.open()
            try:
                sandboxes = await asyncio.gather(*(substrate.create(SandboxSpec()) for _ in range(300)))
                command = Command(argv=("/bin/sh", "-c", "cat; sleep 1"), stdin=b"hello")
                results = await asyncio.gather(*(sandbox.exec(command) for sandbox in sandboxes))
                print(sum(result.stdout.data == b"hello" for result in results))
            finally:
                await substrate.close()

        asyncio.run(main())"""
    limited = ("-c", 'ulimit -Sn 512; exec "$@"', "-", sys.executable, "-c", program, tmp_path)
    assert dsec.done(*limited, command="bash").out == "300\n"


def test_members_of_a_group_differ(dsec: Any, finished: Path) -> None:
    records = dsec.show(finished)
    first, second = (records[f"unclear.{index}"] for index in (0, 1))
    assert first["token_ids"] != second["token_ids"]
    assert [first["group"]["index"], second["group"]["index"], first["group"]["size"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("thinking", "opens_with"), [("none", "<｜Assistant｜></think>"), ("max", "<｜Assistant｜><think>")]
)
def test_every_thinking_mode_runs_on_the_official_prompt(
    dsec: Any, tasks: Path, tmp_path: Path, thinking: Thinking, opens_with: str
) -> None:
    options = ("--thinking", thinking, "--turns-max", 2)
    dsec.done("run", tasks / "copy-5-000", "--out", tmp_path / "run", *options)
    (record,) = dsec.show(tmp_path / "run").values()
    first = next(span for span in record["spans"] if span["trainable"])
    prompt = load_tokenizer().decode(record["token_ids"][: first["start"]])
    instruction = (tasks / "copy-5-000/instruction.md").read_text().rstrip("\n")
    assert prompt.startswith("<｜begin▁of▁sentence｜>")
    assert prompt.endswith(f"<｜User｜>{instruction}{opens_with}")
    assert prompt.startswith(f"<｜begin▁of▁sentence｜>{HIGHEST}") == (thinking == "max")
    assert record["thinking"] == thinking
    jobs = [event.job for _, event in journal.replay(tmp_path / "run/wal") if isinstance(event, JobSubmitted)]
    assert [(job.thinking, job.limits) for job in jobs] == [(thinking, limits_of(thinking, turns_count_max=2))]
    assert any(turn["reasoning"] for turn in record["turns"]) == (thinking != "none")


@pytest.mark.parametrize(("agent", "solved"), [("oracle", 4), ("nop", 0)])
def test_the_solution_solves_every_task_and_doing_nothing_none(
    dsec: Any, tasks: Path, tmp_path: Path, agent: str, solved: int
) -> None:
    summary = dsec.done("run", tasks, "--out", tmp_path / "run", "--agent", agent, "--json").json()
    assert (summary["solved"], summary["finished"], summary["infra_failures"]) == (solved, 4, 0)
    assert summary["tokens"] == 0


def test_resuming_a_finished_run_changes_nothing(dsec: Any, finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    before, shown = digest(run / "wal"), dsec.show(run)
    summary = dsec.done("run", "--resume", "--out", run, "--json").json()
    assert (summary["finished"], summary["resumes"], summary["tokens_replayed"]) == (8, 0, 0)
    assert summary["wall_s"] == json.loads((finished / "summary.json").read_text())["wall_s"]  # nobody worked since
    assert digest(run / "wal") == before
    assert dsec.show(run) == shown


def test_a_resume_that_asks_for_another_run_is_refused(
    dsec: Any, make_task: Any, tasks: Path, finished: Path, tmp_path: Path
) -> None:
    before, resume = digest(finished / "wal"), ("run", "--resume", "--out", finished)
    for option, given, logged in (
        ("--seed", 5, 3),
        ("--seed", 0, 3),  # the default, but asked for
        ("--group-size", 3, 2),
        ("--temperature", 0.5, 1.0),
        ("--turns-max", 7, 6),
        ("--agent", "oracle", "model"),
        ("--thinking", "max", "high"),
    ):
        ran = dsec(*resume, option, given)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err == (
            f"dsec: {option} {given}: {finished} was begun with {option} {logged}; "
            f"to finish {finished} leave it out; for another run choose another --out\n"
        )
    shutil.copytree(tasks, tmp_path / "tasks")
    (tmp_path / "tasks/sort-5-000/instruction.md").write_text("Something else.")
    make_task(tmp_path / "tasks/new")
    ran = dsec(*resume, tmp_path / "tasks")
    assert (ran.code, ran.out) == (2, "")
    assert f"{finished} was begun with other tasks (different: new and 1 more); to finish" in ran.err
    assert digest(finished / "wal") == before


def test_a_resume_may_say_again_what_was_asked_for(dsec: Any, tasks: Path, finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    again = dsec.done("run", tasks, "--resume", "--out", run, *SAME_RUN, "--concurrency", 7, "--json")
    assert again.json()["finished"] == 8


def test_a_directory_that_holds_a_run_is_not_run_into_again(dsec: Any, tasks: Path, finished: Path) -> None:
    before = digest(finished / "wal")
    ran = dsec("run", tasks, "--out", finished)
    assert ran.code == 2
    assert ran.err == f"dsec: {finished} holds a run already: add --resume to finish it, or choose another --out\n"
    assert digest(finished / "wal") == before


def test_show_is_readable(dsec: Any, finished: Path) -> None:
    overview = dsec.done("show", finished).out
    rollouts = [f"{task}.{index}" for task in ("copy-5-000", "unclear") for index in (0, 1)]
    assert [name for name in rollouts if name not in overview] == []
    record = dsec.show(finished)["copy-5-000.1"]
    page = dsec.done("show", finished, "copy-5-000.1").out
    for shown in (
        record["turns"][0]["reasoning"].split("\n")[0],
        "bash(command=",
        f"reward {record['reward']['value']:g}",
        "STOP",
    ):
        assert shown in page
    unknown = dsec("show", finished, "nosuch")
    assert unknown.code == 2
    assert unknown.err.startswith("dsec: 'nosuch' names 0 rollouts of this log")
    assert "copy-5-000.1" in dsec("show", finished, "copy-5-00.1").err  # what is near is named
    assert "rollout copy-5-000.0 " in dsec.done("show", finished, "copy-5-000").out


def test_log_prints_every_record_decoded(dsec: Any, finished: Path) -> None:
    lines = dsec.done("log", finished, "--json").lines()
    assert [line["lsn"] for line in lines] == list(range(1, len(lines) + 1))
    assert [line for line in lines if "undecodable" in line["record"]] == []
    kinds = [line["record"].get("type") for line in lines]
    assert kinds.count("rollout_opened") == kinds.count("rollout_finished") == kinds.count("judged") == 8
    assert kinds.index("job_submitted") > max(n for n, kind in enumerate(kinds) if kind == "task_admitted")
    sampled = sum(len(row["token_ids"]) for line in lines if line["kind"] == 6 for row in line["record"]["rows"])
    assert sampled == json.loads((finished / "summary.json").read_text())["tokens"]
    assert dsec.done("log", finished, "--verify").out.startswith(f"ok: {len(lines)} records")


def test_a_flipped_byte_is_told_and_nothing_is_touched(dsec: Any, finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (segment,) = (run / "wal").glob("*.wal")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 0x40
    segment.write_bytes(data)
    before = digest(run / "wal")
    for command in (("log", run), ("show", run), ("show", run, "--json"), ("run", "--resume", "--out", run)):
        ran = dsec(*command)
        assert ran.code == 1, command
        assert f"{segment} is corrupt at offset" in ran.err
        assert "Way out: " in ran.err
        assert len(ran.err.splitlines()) == 1
    ran = dsec("-m", "wal", run / "wal", command=sys.executable, cwd=Path(__file__).parents[2])
    assert (ran.code, f"{segment} is corrupt" in ran.err) == (1, True)
    assert len(ran.out.splitlines()) > 10
    assert digest(run / "wal") == before


def test_a_torn_tail_is_cut_and_what_it_held_is_done_again(dsec: Any, finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (segment,) = (run / "wal").glob("*.wal")
    os.truncate(segment, segment.stat().st_size - 5)
    told = dsec.done("log", run, "--verify")
    assert "torn tail" in told.err
    summary = dsec.done("run", "--resume", "--out", run, "--json").json()
    assert (summary["finished"], summary["tokens_regenerated"], summary["commands_run_twice"]) == (8, 0, 0)
    assert {n: r["token_ids"] for n, r in dsec.show(run).items()} == {
        n: r["token_ids"] for n, r in dsec.show(finished).items()
    }


def test_a_record_that_no_version_wrote_is_shown_and_fails_the_verification(dsec: Any, tmp_path: Path) -> None:
    with wal.Log.open(tmp_path / "run" / "wal") as log:
        log.append(2, b"no event")
    assert '{"undecodable": "a record of kind 2 does not fit its schema' in dsec.done("log", tmp_path / "run").out
    assert dsec("log", tmp_path / "run", "--verify").code == 1


def test_a_signal_stops_a_run_where_it_is_and_a_resume_finishes_it(
    dsec: Any, tasks: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = dsec.start("run", tasks, "--out", run, *SAME_RUN)
    wait_for_tokens(process, run)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopped by SIGINT; finish with: " in err
    assert f"dsec run --resume --out {run}" in err
    for record in dsec.show(run).values():  # aligned also in mid-turn
        assert sum(span["length"] for span in record["spans"]) == len(record["token_ids"]) == len(record["logprobs"])
    dsec.done("run", "--resume", "--out", run)
    assert {n: r["token_ids"] for n, r in dsec.show(run).items()} == {
        n: r["token_ids"] for n, r in dsec.show(finished).items()
    }


def test_gc_clears_what_a_killed_run_left(dsec: Any, tasks: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = dsec.start("run", tasks, "--out", run, *SAME_RUN)
    wait_for_tokens(process, run)
    dsec.kill(process)
    assert dsec.cgroups() != []
    said = dsec.done("gc").out
    assert said.startswith("removed ")
    assert said != "removed 0 leftover cgroups\n"
    assert dsec.left() == []


def test_gc_leaves_living_runs_alone(dsec: Any, tasks: Path, tmp_path: Path) -> None:
    process = dsec.start("run", tasks, "--out", tmp_path / "run", *SAME_RUN, "--json")
    wait_for_tokens(process, tmp_path / "run")
    assert dsec.done("gc", "--json").json() == {"cgroups_removed": 0}
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert json.loads(out)["infra_failures"] == 0


def test_doctor_finds_this_host_fit(dsec: Any) -> None:
    findings = dsec.done("doctor", "--json").json()
    assert [finding for finding in findings if not finding["ok"] and not finding["optional"]] == []
    assert {"root", "kernel", "overlayfs", "cgroup2", "dsec-sandbox"} <= {finding["name"] for finding in findings}
    assert not [finding for finding in findings if finding["ok"] and finding["remedy"]]
    told = dsec.done("doctor", env={"COLUMNS": "40"}).out
    assert "missing" not in told
    assert [finding for finding in findings if finding["detail"] not in told] == []  # no path is broken into lines


def test_doctor_looks_on_where_it_may_not_look(dsec: Any, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    (closed / "images").mkdir(parents=True)
    closed.chmod(0)
    as_other = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all"]
    for images in (closed / "images", Path("/proc/1/root/images")):
        told = subprocess.run(
            [*as_other, dsec.path, "doctor"],
            env={**os.environ, "DSEC_IMAGES_DIRECTORY": str(images)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (told.returncode, told.stderr) == (3, "")
        assert "effective uid 65534" in told.stdout


def wait_for_tokens(process: subprocess.Popen[str], run: Path) -> None:
    """Until the log has grown by some sampled tokens (segments are only ever appended to, zeros are reserved space)."""
    sizes: set[int] = set()
    while len(sizes) < 6:
        assert process.poll() is None, process.communicate()
        sizes.add(sum(len(path.read_bytes().rstrip(b"\0")) for path in run.glob("wal/*.wal")))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
