"""The families `bug` and `writefn`: a Python function to repair or to write, checked by calling it.

What a function must return is worked out by running the right body, so a test can only ask for
what some body gives; a wrong body is used only with arguments on which it differs.
"""

from __future__ import annotations

from typing import Any

from training.curriculum.draw import LETTERS, Draw
from training.curriculum.problem import Problem, Program
from training.curriculum.templates import TEMPLATES, Template

TEST = """import sys
from {module} import {function}

got = {function}({arguments})
want = {want!r}
if got != want:
    sys.exit(f"FAIL: got {{got!r}}, want {{want!r}}")
print("PASS")
"""
CASES_COUNT = 6
BUGS = tuple(t for t in TEMPLATES if t.bad)
WRITES = tuple(t for t in TEMPLATES if t.says)


class _Function:
    """One template with names filled in."""

    def __init__(self, draw: Draw, template: Template) -> None:
        stem, extra = draw.one(template.stems), draw.word()
        self.template = template
        self.name = draw.one((stem, f"{stem}_{extra}", f"{extra}_{stem}"))
        self.names = _parameters(draw, template)

    def fill(self, pattern: str) -> str:
        """A body or a description with the parameters' names."""
        return pattern.replace("{a}", self.names[0]).replace("{b}", self.names[-1])

    @property
    def head(self) -> str:
        """Name and parameters, as in a definition."""
        return f"{self.name}({', '.join(self.names)})"

    def source(self, pattern: str) -> str:
        """The definition with this body."""
        return f"def {self.head}:\n" + "".join(f"    {line}\n" for line in self.fill(pattern).split("\n"))

    def result(self, pattern: str, arguments: tuple[object, ...]) -> object:
        """What the definition with this body returns; an exception is a result as well."""
        space: dict[str, Any] = {}
        exec(self.source(pattern), space)  # noqa: S102 - bodies of templates.py only
        try:
            return space[self.name](*arguments)
        except (ArithmeticError, LookupError, TypeError, ValueError) as why:
            return repr(why)


def _parameters(draw: Draw, template: Template) -> tuple[str, ...]:
    if template.kinds == "L":
        return (draw.one(template.lists),)
    if len(template.kinds) == 1 and draw.chance(50):
        return (draw.word(),)
    return tuple(draw.shuffled(LETTERS)[: len(template.kinds)])


def _arguments(draw: Draw, kinds: str) -> tuple[object, ...]:
    return tuple(_argument(draw, kind) for kind in kinds)


def _argument(draw: Draw, kind: str) -> object:
    if kind == "S":
        return draw.known_word()
    if kind == "N":
        return draw.between(1, 15)
    return [draw.between(1, 30) for _ in range(draw.between(3, 5))]


def _cases(draw: Draw, function: _Function, bad: str) -> tuple[tuple[tuple[object, ...], object], ...]:
    """Arguments and wanted results; the first case tells `good` from `bad`."""
    good = function.template.good
    cases: list[tuple[tuple[object, ...], object]] = []
    while len(cases) < CASES_COUNT:
        arguments = _arguments(draw, function.template.kinds)
        wanted = function.result(good, arguments)
        if cases or not bad or function.result(bad, arguments) != wanted:
            cases.append((arguments, wanted))
    return tuple(cases)


def _test(module: str, function: _Function, case: tuple[tuple[object, ...], object]) -> str:
    arguments = ", ".join(map(repr, case[0]))
    return TEST.format(module=module, function=function.name, arguments=arguments, want=case[1])


def _write(name: str, source: str) -> str:
    return f"cat > {name} <<'EOF'\n{source}EOF"


def make_bug(draw: Draw, templates: tuple[Template, ...] = BUGS) -> Problem:
    """Repair one line of a function whose test fails."""
    module, function = draw.word(), _Function(draw, draw.one(templates))
    bad, good = draw.one(function.template.bad), function.template.good
    others = [t for t in templates if t is not function.template]
    other = _Function(draw, draw.one(others)) if others and draw.chance(40) else None
    cases = _cases(draw, function, bad)
    before, after = [function.source(bad)], [function.source(good)]
    if other is not None:
        place = draw.below(2)
        before.insert(place, other.source(other.template.good))
        after.insert(place, other.source(other.template.good))
    code, test = f"{module}.py", f"test_{module}.py"
    request = draw.one(
        (
            f"The test {test} is failing. Please fix {code}.",
            f"python3 {test} fails. Fix the bug in {code}.",
            f"Function {function.name} in {code} is wrong. Repair it, then run {test}.",
            f"Compare {code} with {test} and correct the code.",
        )
    )
    tested = {test: _test(module, function, cases[0])}
    return Problem(
        request,
        {code: "\n\n".join(before), **tested},
        _write(code, "\n\n".join(after)),
        expected=tested,
        program=Program(module, function.name, cases),
    )


def make_writefn(draw: Draw, templates: tuple[Template, ...] = WRITES) -> Problem:
    """Write a module with one function that a given test calls."""
    module, function = draw.word(), _Function(draw, draw.one(templates))
    cases = _cases(draw, function, "")
    code, test, says = f"{module}.py", f"test_{module}.py", function.fill(function.template.says)
    request = draw.one(
        (
            f"Write {code} with a function {function.head} that returns {says}. Test: {test}",
            f"Create {code}: {function.head} must return {says}. Then run {test}.",
        )
    )
    tested = {test: _test(module, function, cases[0])}
    return Problem(
        request,
        tested,
        _write(code, function.source(function.template.good)),
        expected=tested,
        program=Program(module, function.name, cases),
    )
