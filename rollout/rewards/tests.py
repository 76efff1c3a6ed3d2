"""The reward that a task's own tests give: the commands to run, and how their results are read.

Pure on both sides: `verify_commands` says what to run, in order, and `reward_from` reads what came
of it; the Runner runs the commands under the log's rules in between.  The agent had the sandbox to
itself, so processes that it left running are killed (one could rewrite the reward), and whatever it
left in /tests or /logs is removed before the tests are uploaded.

Reward files, as in Harbor: `/logs/verifier/reward.json` (an object of finite numbers: its "reward"
key is the value, or its only key) or else `/logs/verifier/reward.txt` (one finite number).  No
file, an empty one, or another content is a VerifierError, never a reward of 0.

See: docs/formats/task.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping

import msgspec

from dsec.types import Command, ExecResult
from rollout.bench.archive import make_folders, setup_command, upload
from rollout.bench.tasks import LOG_FOLDERS, Task
from rollout.errors import TaskError, VerifierError

REWARD_BYTES_MAX = 64 << 10
TAIL_LINES_MAX = 10
RUN, READ = "test.sh", "read reward"
ANSWER = "/logs/agent/answer.txt"
_READ_REWARD = f"""cd /logs/verifier || exit 1
for name in reward.json reward.txt; do
    [ -f "$name" ] || continue
    echo "$name"
    exec head -c {REWARD_BYTES_MAX + 1} "$name"
done
echo none"""
_CLEAN = """rm -rf -- "${@:2}" && { [ -d "$1" ] || { rm -rf -- "$1" && mkdir -p -- "$1"; }; }"""


class Reward(msgspec.Struct, frozen=True):
    """What the tests gave; `verifier_digest` is the sha256 of tests/."""

    value: float
    components: dict[str, float]
    verifier_digest: str


def verify_commands(task: Task, answer: str | None) -> tuple[tuple[str, Command], ...]:
    """Named commands that verify a rollout, to be run in order once the agent has finished.

    `answer` is the agent's final message: tests find it as /logs/agent/answer.txt.  With None (the
    oracle, whose solve.sh may write that file) /logs/agent is left as it is.
    """
    env = {**task.env, **task.verifier_env}
    swept = ("/tests", "/solution", "/logs") if answer is not None else ("/tests", "/logs/verifier")
    clean = _bash(task.env, _CLEAN, task.workdir, *swept)
    named = [
        ("clean", msgspec.structs.replace(clean, kill_others=not task.keep_processes)),
        ("make folders", make_folders(task.env, "/tests", *LOG_FOLDERS)),
        *(("upload tests", command) for command in upload(task.tests, "/tests", task.env)),
    ]
    if answer is not None:
        named.append(("write answer", _bash(task.env, f"cat > {ANSWER}", stdin=answer.encode(errors="replace"))))
    run = setup_command(env, ("bash", "/tests/test.sh"), cwd=task.workdir, timeout_s=task.verifier_timeout_s)
    return (*named, (RUN, run), (READ, _bash(task.env, _READ_REWARD)))


def solution_commands(task: Task) -> tuple[tuple[str, Command], ...]:
    """Named commands by which the oracle solves a task; each must exit 0.  TaskError without a solution/."""
    if not task.solution:
        raise TaskError(f"{task.name}: solution/solve.sh: missing: the oracle has nothing to run")
    env = {**task.env, **task.solution_env}
    run = setup_command(env, ("bash", "/solution/solve.sh"), cwd=task.workdir, timeout_s=task.agent_timeout_s)
    return (
        ("make folders", make_folders(task.env, "/solution")),
        *(("upload solution", command) for command in upload(task.solution, "/solution", task.env)),
        ("solve.sh", run),
    )


def reward_from(task: Task, results: Iterable[tuple[str, ExecResult]]) -> Reward:
    """Read the reward out of the results of `verify_commands`, named as there.  VerifierError.

    The exit code of test.sh does not count; only the reward file does.
    """
    ran, read = None, None
    for name, result in results:
        if name == RUN:
            ran = result
        elif result.exit_code or result.timed_out:
            raise VerifierError(f"{task.name}: {name}: {ending(result)}")
        elif name == READ:
            read = result
    if ran is None or read is None:
        raise VerifierError(f"{task.name}: the verifier did not run to its end")
    if ran.timed_out:
        raise VerifierError(f"{task.name}: test.sh: no end within {task.verifier_timeout_s:g} s: {ending(ran)}")
    try:
        components = _parse(read.stdout.data)
    except ValueError as why:
        raise VerifierError(f"{task.name}: {why}; test.sh: {ending(ran)}") from why
    value = components["reward"] if "reward" in components else next(iter(components.values()))
    return Reward(value, components, task.verifier_digest)


def _parse(printed: bytes) -> dict[str, float]:
    """Components of the reward file that _READ_REWARD printed after its name."""
    name, _, data = printed.partition(b"\n")
    if name == b"none":
        raise ValueError("no reward: test.sh must write /logs/verifier/reward.txt or reward.json")
    file = f"/logs/verifier/{name.decode()}"
    if len(data) > REWARD_BYTES_MAX:
        raise ValueError(f"{file}: over {REWARD_BYTES_MAX} bytes")
    text = data.decode(errors="replace").strip()
    if not text:
        raise ValueError(f"{file}: empty: write a number to it")
    is_json = name == b"reward.json"
    try:
        found = json.loads(text) if is_json else {"reward": float(text)}
    except (ValueError, RecursionError):
        raise ValueError(f"{file}: {text[:80]!r} cannot be read as {'JSON' if is_json else 'a number'}") from None
    return _components(file, found)


def _components(file: str, found: object) -> dict[str, float]:
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{file}: must hold an object of numbers")
    for key, number in found.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not _is_finite(number):
            raise ValueError(f"{file}: {key} is {str(number)[:80]}, not a finite number")
    if len(found) > 1 and "reward" not in found:
        raise ValueError(f'{file}: several numbers and none of them named "reward"')
    return {str(key): float(number) for key, number in found.items()}


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int beyond every float
        return False


def ending(result: ExecResult) -> str:
    """Exit code and the last lines of the output, for a message."""
    lines = result.stdout.data.decode(errors="replace").splitlines()[-TAIL_LINES_MAX:]
    killed = ", killed for memory" if result.oom_killed else ""
    said = ", output ends:\n" + "\n".join(line[:300] for line in lines) if lines else ", no output"
    return f"exit code {result.exit_code}{killed}{said}"


def _bash(env: Mapping[str, str], script: str, *words: str, stdin: bytes = b"") -> Command:
    argv = ("bash", "-c", script, "bash", *words)
    return setup_command(env, argv, stdin=stdin, output_bytes_max=2 * REWARD_BYTES_MAX, merge_stderr=False)
