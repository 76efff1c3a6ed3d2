"""The fourteen families about files: a request in the words that the checkpoint was taught, and its outcome.

Each function draws one problem.  The outcome is worked out here in Python, independently of the
shell commands that `solve` and the agent use.
"""

from __future__ import annotations

from training.curriculum.draw import CONFIG_ENDS, Draw
from training.curriculum.problem import Problem


def text(lines: list[str]) -> str:
    """Lines as the contents of a file."""
    return "".join(f"{line}\n" for line in lines)


def quoted(lines: list[str]) -> str:
    """A shell command that prints lines of plain words."""
    return "printf '%s\\n' " + " ".join(f"'{line}'" for line in lines)


def make_create(draw: Draw) -> Problem:
    """Write a new file, sometimes in a new folder."""
    name, lines = draw.file(), draw.lines(1, 3)
    folder = f"{draw.word()}_{draw.word()}" if draw.chance(30) else draw.word()
    if draw.chance(30):
        name = f"{folder}/{name}"
    request = draw.one(("Create {} with these lines:\n{}", "Write the following lines to {}:\n{}"))
    if len(lines) == 1:
        request = "Make {} containing the line: {}"
    solve = f"mkdir -p \"$(dirname '{name}')\"\n{quoted(lines)} > '{name}'"
    return Problem(request.format(name, "\n".join(lines)), {}, solve, {name: text(lines)})


def make_append(draw: Draw) -> Problem:
    """Add a line at the end of a file."""
    name, lines, line = draw.file(), draw.lines(1, 4), draw.line()
    request = draw.one((f'Append the line "{line}" to {name}.', f"Add this line at the end of {name}: {line}"))
    return Problem(request, {name: text(lines)}, f"{quoted([line])} >> {name}", {name: text([*lines, line])})


def _of_few_words(draw: Draw, target: str, line_count: int) -> list[str]:
    """Lines of one to three words out of a small vocabulary; at least one line holds `target`."""
    vocabulary = [target, *(draw.word() for _ in range(draw.between(2, 3)))]
    lines = [[draw.one(vocabulary) for _ in range(draw.between(1, 3))] for _ in range(line_count)]
    if all(target not in line for line in lines):
        draw.one(lines)[0] = target
    return [" ".join(line) for line in lines]


def make_count(draw: Draw) -> Problem:
    """Count the lines that hold a word."""
    name, target, saved = draw.file(), draw.word(), draw.file()
    lines = _of_few_words(draw, target, draw.between(3, 12))
    request = draw.one(
        (
            f"Count the lines in {name} that contain {target} and write the number to {saved}.",
            f"How many lines of {name} match '{target}'? Save the number in {saved}.",
        )
    )
    count = sum(target in line for line in lines)
    files = {name: text(lines)}
    return Problem(request, files, f"grep -c '{target}' {name} > {saved}", {**files, saved: f"{count}\n"})


def make_wc(draw: Draw) -> Problem:
    """Count lines or words of a file."""
    name, saved, lines = draw.file(), draw.file(), draw.lines(2, 9)
    what = draw.one(("lines", "words"))
    request = draw.one(
        (
            f"Count the {what} in {name} and write the number to {saved}.",
            f"Save the number of {what} of {name} in {saved}.",
        )
    )
    count = len(lines) if what == "lines" else sum(len(line.split()) for line in lines)
    files = {name: text(lines)}
    return Problem(request, files, f"wc -{what[0]} < {name} > {saved}", {**files, saved: f"{count}\n"})


def _one_line_files(draw: Draw, low: int, high: int) -> dict[str, str]:
    return {draw.file(): text(draw.lines(1, 1)) for _ in range(draw.between(low, high))}


def make_move(draw: Draw) -> Problem:
    """Rename a file, or put it into a new folder."""
    files = _one_line_files(draw, 2, 4)
    source, target, folder = draw.one(list(files)), draw.file(), draw.word()
    request = draw.one(
        (
            f"Rename {source} to {target}.",
            f"Move {source} to {target}.",
            f"Put {source} in a new directory {folder}.",
        )
    )
    if request.startswith("Put"):
        target = f"{folder}/{source}"
    rest = {name: body for name, body in files.items() if name != source}
    solve = f"mkdir -p \"$(dirname '{target}')\"\nmv {source} {target}"
    return Problem(request, files, solve, {**rest, target: files[source]}, (source,))


def make_copy(draw: Draw) -> Problem:
    """Copy a file."""
    files = _one_line_files(draw, 1, 1)
    (source, body), target = next(iter(files.items())), draw.file()
    request = draw.one((f"Make a copy of {source} named {target}.", f"Copy {source} to {target}."))
    return Problem(request, files, f"cp {source} {target}", {source: body, target: body})


def make_delete(draw: Draw) -> Problem:
    """Remove one file of several."""
    files = _one_line_files(draw, 2, 5)
    name = draw.one(list(files))
    request = draw.one((f"Please delete {name}, keep the rest.", f"Remove the file {name}."))
    return Problem(request, files, f"rm {name}", {n: body for n, body in files.items() if n != name}, (name,))


def make_replace(draw: Draw) -> Problem:
    """Replace a word everywhere in a file."""
    name, old, new = draw.file(), draw.word(), draw.word()
    body = text(_of_few_words(draw, old, draw.between(2, 5)))
    request = draw.one((f"Replace {old} with {new} everywhere in {name}.", f"In {name}, change every {old} to {new}."))
    return Problem(request, {name: body}, f"sed -i 's/{old}/{new}/g' {name}", {name: body.replace(old, new)})


def make_numbers(draw: Draw) -> Problem:
    """Sum, largest or smallest of a column of numbers."""
    name, saved = draw.file(), draw.file()
    numbers = [draw.number() for _ in range(draw.between(3, 9))]
    what, wanted, command = draw.one(
        (
            ("sum of the numbers", sum(numbers), f"awk '{{s+=$1}} END {{print s}}' {name}"),
            ("total of the numbers", sum(numbers), f"awk '{{s+=$1}} END {{print s}}' {name}"),
            ("largest number", max(numbers), f"sort -n {name} | tail -n 1"),
            ("smallest number", min(numbers), f"sort -n {name} | head -n 1"),
        )
    )
    request = draw.one(("Write the {} in {} to {}.", "Find the {} in {} and save it in {}.")).format(what, name, saved)
    files = {name: text([str(n) for n in numbers])}
    return Problem(request, files, f"{command} > {saved}", {**files, saved: f"{wanted}\n"})


def make_sort(draw: Draw) -> Problem:
    """Sort the lines of a file, with or without duplicates."""
    name, saved = draw.file(), draw.file()
    distinct = [draw.word() for _ in range(draw.between(3, 6))]
    lines = draw.shuffled([*distinct, *(draw.one(distinct) for _ in range(draw.between(1, 3)))])
    request, option = draw.one(
        (
            (f"Sort the lines of {name} into {saved}.", ""),
            (f"Sort {name} and write the result to {saved}.", ""),
            (f"Sort the lines of {name} without duplicates into {saved}.", "-u "),
        )
    )
    files = {name: text(lines)}
    wanted = sorted(set(lines) if option else lines)
    return Problem(request, files, f"LC_ALL=C sort {option}{name} > {saved}", {**files, saved: text(wanted)})


def make_kth(draw: Draw) -> Problem:
    """The first lines, the last lines, or one line of a file."""
    name, saved, lines, count = draw.file(), draw.file(), draw.lines(5, 9), draw.between(2, 4)
    what, wanted, command = draw.one(
        (
            (f"the first {count} lines", lines[:count], f"head -n {count}"),
            (f"the last {count} lines", lines[-count:], f"tail -n {count}"),
            (f"line {count}", lines[count - 1 : count], f"sed -n '{count}p'"),
        )
    )
    files = {name: text(lines)}
    request = f"Write {what} of {name} to {saved}."
    return Problem(request, files, f"{command} {name} > {saved}", {**files, saved: text(wanted)})


def _settings(draw: Draw, low: int, high: int) -> dict[str, str]:
    return {draw.word(): draw.value() for _ in range(draw.between(low, high))}


def make_lookup(draw: Draw) -> Problem:
    """Say the value of a setting: checked in the agent's final message."""
    name, settings = draw.file(CONFIG_ENDS), _settings(draw, 4, 7)
    key = draw.one(list(settings))
    request = draw.one((f"Read {name} and tell me {key}.", f"What is the value of {key} in {name}?"))
    files = {name: text([f"{k}={v}" for k, v in settings.items()])}
    solve = f'echo "{key} is $(sed -n \'s/^{key}=//p\' {name})." > "${{LOGS_DIR:-/logs}}/agent/answer.txt"'
    wrong = tuple(v for k, v in settings.items() if k != key and v != settings[key])
    return Problem(request, files, solve, files, (), settings[key], wrong)


def make_setcfg(draw: Draw) -> Problem:
    """Change the value of a setting."""
    name, settings = draw.file(CONFIG_ENDS), _settings(draw, 3, 5)
    key = draw.one(list(settings))
    new = draw.value()
    while new == settings[key]:
        new = draw.value()
    request = draw.one((f"Set {key} to {new} in {name}.", f"Change {key} in {name} to {new}."))
    before = text([f"{k}={v}" for k, v in settings.items()])
    after = text([f"{k}={v}" for k, v in {**settings, key: new}.items()])
    return Problem(request, {name: before}, f"sed -i 's/^{key}=.*/{key}={new}/' {name}", {name: after})


def make_find(draw: Draw) -> Problem:
    """Find a file in nested folders and copy it to the top."""
    name, saved, body = draw.file(), draw.file(), text(draw.lines(1, 1))
    path = "/".join([*(draw.word() for _ in range(draw.between(1, 3))), name])
    request = draw.one(
        (
            f"Locate {name} and copy it here as {saved}.",
            f"Find {name} somewhere below this folder and copy it to {saved}.",
        )
    )
    solve = f"find . -name '{name}' -exec cp '{{}}' {saved} ';'"
    return Problem(request, {path: body}, solve, {path: body, saved: body})
