"""What a generated task is, before it becomes a folder: a request, files, and what must hold afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Program:
    """A Python function to check: by its test file, which must print PASS, and by further calls.

    `cases` are (arguments, wanted result) as Python literals.
    """

    module: str
    function: str
    cases: tuple[tuple[tuple[object, ...], object], ...]


@dataclass(frozen=True)
class Problem:
    """One task.  `files` lie in the working directory at the start; `expected` must lie there at the
    end, byte for byte (further files do not matter); `gone` must not; `answer` must be said in the
    final message, `wrong_answers` must not.  `solve` is a shell script that does it.
    """

    request: str
    files: dict[str, str]
    solve: str
    expected: dict[str, str] = field(default_factory=dict)
    gone: tuple[str, ...] = ()
    answer: str = ""
    wrong_answers: tuple[str, ...] = ()
    program: Program | None = None
