"""The fuzz target without a fuzzer: every seed made of the vectors keeps every law."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def target() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_parser", Path(__file__).with_name("fuzz_parser.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_seed_keeps_every_law(target: ModuleType) -> None:
    seeds = list(target.seeds())
    assert len(seeds) > 300
    for seed in seeds:
        target.check(seed)


@pytest.mark.parametrize("data", [b"", b"\x03", bytes([6, 0]), bytes(range(256)), b"\x02\x05" + b"\xd0" * 300])
def test_any_bytes_are_a_turn(data: bytes, target: ModuleType) -> None:
    target.check(data)


def test_text_behind_the_end_of_a_tolerant_turn_is_not_held(target: ModuleType) -> None:
    pieces = target.pieces_of("v4")
    after_end = [
        target.FIRST_PIECE + pieces.index(piece) for piece in ("<｜end▁of▁sentence｜>", "</｜DSML｜parameter>\n")
    ]
    opened = [target.FIRST_PIECE + pieces.index('<｜DSML｜invoke name="f">\n')]
    target.check(bytes([2, 0, *opened, after_end[0], *([after_end[1]] * 120)]))
