"""A problem as a task folder in Harbor's format, with real checks and a real solution.

`tests/test.sh` needs bash and coreutils, and python3 where a function is checked.  Its variables
APP_DIR, TESTS_DIR and LOGS_DIR stand for /app, /tests and /logs, so that a task can be verified
without a container.  Checks of the agent's final message read /logs/agent/answer.txt, which the
rollout service writes before the tests run.

See: training/README.md.
"""

from __future__ import annotations

from pathlib import Path

from training.curriculum.problem import Problem, Program

TASK_TOML = """schema_version = "1.4"

[task]
name = "curriculum/{name}"
description = "{family}: a task of the curriculum"
keywords = ["curriculum", "{family}"]

[verifier]
timeout_sec = 60.0

[agent]
timeout_sec = 300.0

[environment]
network_mode = "no-network"
memory_mb = 256
workdir = "/app"
"""
DOCKERFILE = "FROM debian:bookworm-slim\n"
PYTHON = """RUN apt-get update && apt-get install -y --no-install-recommends python3 \\
    && rm -rf /var/lib/apt/lists/*
"""
TEST_SH = """#!/bin/bash
# Writes 1 if everything is as the request wants it, else 0.
app=${APP_DIR:-/app}; here=${TESTS_DIR:-/tests}; logs=${LOGS_DIR:-/logs}
reward=1
wrong() { echo "$1"; reward=0; }
cd "$app" || exit 1
"""
TEST_EXPECTED = """shopt -s globstar
for path in "$here"/expected/**; do
    name=${path#"$here"/expected/}
    [ -d "$path" ] || cmp -s "$path" "$name" || wrong "not as expected: $name"
done
"""
TEST_GONE = """[ ! -e '{name}' ] && [ ! -L '{name}' ] || wrong 'still there: {name}'
"""
TEST_ANSWER = """answer=$logs/agent/answer.txt
grep -qwF -e '{value}' "$answer" || wrong 'the final message does not say {value}'
"""
TEST_WRONG_ANSWER = """grep -qwF -e '{value}' "$answer" && wrong 'the final message says {value}'
"""
TEST_PROGRAM = """cp "$here/expected/test_{module}.py" .
[ "$(timeout 10 python3 test_{module}.py)" = PASS ] || wrong 'test_{module}.py does not print PASS'
[ "$(timeout 10 python3 "$here/more_cases.py" "$app")" = PASS ] || wrong 'other arguments give other results'
"""
TEST_END = """mkdir -p "$logs/verifier"
echo "$reward" > "$logs/verifier/reward.txt"
"""
MORE_CASES = '''"""Prints PASS if {function} is right for more arguments than the visible test's.

It is called in a process of its own, which does not hold the wanted results.
"""
import subprocess
import sys

CASES = (
{cases})
CALLS = """
import sys
sys.path.insert(0, sys.argv[1])
from {module} import {function}
print([{function}(*arguments) for arguments in eval(sys.argv[2])])
"""
arguments = repr([arguments for arguments, _ in CASES])
done = subprocess.run([sys.executable, "-c", CALLS, sys.argv[1], arguments], capture_output=True, text=True)
want = repr([result for _, result in CASES])
if done.stdout.splitlines()[-1:] != [want]:
    sys.exit(f"FAIL: got {{done.stdout[-500:]}} {{done.stderr[-500:]}}, want {{want}}")
print("PASS")
'''
SOLVE_SH = """#!/bin/bash
set -e
cd "${{APP_DIR:-/app}}"
{solve}
"""


def files_of(name: str, family: str, problem: Problem) -> dict[str, str]:
    """The files of the task folder by their names in it; those that end in .sh are executable."""
    files = {
        "task.toml": TASK_TOML.format(name=name, family=family),
        "instruction.md": problem.request + "\n",
        "environment/Dockerfile": _dockerfile(problem),
        "tests/test.sh": _test_sh(problem),
        "solution/solve.sh": SOLVE_SH.format(solve=problem.solve),
    }
    files |= {f"environment/files/{path}": body for path, body in problem.files.items()}
    files |= {f"tests/expected/{path}": body for path, body in problem.expected.items()}
    if problem.program is not None:
        files["tests/more_cases.py"] = _more_cases(problem.program)
    return files


def write_task(root: Path, name: str, family: str, problem: Problem) -> Path:
    """Write the task folder `root`/`name`, which must not exist.  FileExistsError."""
    folder = root / name
    folder.mkdir(parents=True)
    for path, body in files_of(name, family, problem).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(body.encode())
        target.chmod(0o755 if path.endswith(".sh") else 0o644)
    return folder


def _dockerfile(problem: Problem) -> str:
    python = PYTHON if problem.program is not None else ""
    return DOCKERFILE + python + "WORKDIR /app\n" + ("COPY files/ /app/\n" if problem.files else "")


def _test_sh(problem: Problem) -> str:
    parts = [TEST_SH]
    if problem.program is not None:
        parts.append(TEST_PROGRAM.format(module=problem.program.module))
    if problem.expected:
        parts.append(TEST_EXPECTED)
    parts += [TEST_GONE.format(name=name) for name in problem.gone]
    if problem.answer:
        parts.append(TEST_ANSWER.format(value=problem.answer))
        parts += [TEST_WRONG_ANSWER.format(value=value) for value in dict.fromkeys(problem.wrong_answers)]
    return "".join([*parts, TEST_END])


def _more_cases(program: Program) -> str:
    cases = "".join(f"    ({arguments!r}, {want!r}),\n" for arguments, want in program.cases)
    return MORE_CASES.format(module=program.module, function=program.function, cases=cases)
