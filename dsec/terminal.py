"""Text for a terminal.  What comes from a model, a sandbox or a client is hostile: controls are shown, never sent."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with control and direction-changing characters written out."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def visible_line(text: str) -> str:
    """As `visible`, line ends and tabs too."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def counted(count: int, what: str) -> str:
    """`1 sandbox`, `2 sandboxes`; `what` is one of them."""
    ending = "es" if what.endswith(("x", "s", "ch")) else "s"
    return f"{count} {what}{'' if count == 1 else ending}"


def span_text(seconds: float) -> str:
    """A span in the largest unit that it has whole: `59s`, `3m`, `5h`, `12d`."""
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "m")):
        if seconds >= unit:
            return f"{seconds // unit:.0f}{name}"
    return f"{max(seconds, 0) // 1:.0f}s"


def shortened(text: str, count: int) -> str:
    """At most so many characters of a text, for a table; dots say that there are more."""
    return text if len(text) <= count else text[: count - 2] + ".."


def render_columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table: one line a row, columns two spaces apart, every cell made visible."""
    lines = [tuple(head), *(tuple(map(visible_line, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
