"""What the tables of the command line say of a sandbox."""

from __future__ import annotations

import pytest

from dsec.cli_sandbox import _base
from dsec.images import Image
from dsec.terminal import shortened, span_text
from dsec.types import LayerId, SandboxSpec

A, B, C = (LayerId(f"sha256:{name * 64}") for name in "abc")
IMAGES = [Image(name="debian", layers=(C,)), Image(name="tools:1", layers=(B, C))]


@pytest.mark.parametrize(
    ("base", "layers", "name"),
    [("host", (), "host"), ("host", (A,), "host+1"), ("", (C,), "debian"), ("", (B, C), "tools:1"),
     ("", (A, B, C), "tools:1+1"), ("", (A, C), "debian+1"), ("", (B, A), f"{A[:19]}+1")],
)  # fmt: skip
def test_a_sandbox_is_of_the_image_whose_layers_are_its_lowest(
    base: str, layers: tuple[LayerId, ...], name: str
) -> None:
    assert _base(SandboxSpec(base=base, layers=layers), IMAGES) == name  # type: ignore[arg-type]


def test_spans_and_long_texts_are_short() -> None:
    assert [span_text(seconds) for seconds in (-1, 0, 59.9, 60, 7300, 90_000)] == ["0s", "0s", "59s", "1m", "2h", "1d"]
    assert (shortened("a" * 20, 20), shortened("a" * 21, 20)) == ("a" * 20, "a" * 18 + "..")
