"""The cache of states on disk: whatever becomes of its files, a context is computed again at worst."""

import asyncio
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.engines import state_cache
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.engines.kept_state import TOKEN_BYTES, KeptState, write_state
from rollout.engines.state_cache import TOKENS_MIN, StateCache
from rollout.errors import RequestError

MIB = 1 << 20


def tokens(count: int, first: int = 0) -> bytes:
    return b"".join((first + i).to_bytes(TOKEN_BYTES, "little") for i in range(count))


def state(count: int, first: int = 0, *, weights: str = "w", size: int = 1000) -> KeptState:
    return KeptState("build", (weights,), tokens(count, first), bytearray(size))


@asynccontextmanager
async def opened(folder: Path, bytes_max: int = MIB, build: str = "build") -> AsyncIterator[StateCache]:
    cache = StateCache(folder, bytes_max, build)
    await cache.open()
    yield cache
    await cache.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - threads tell nobody
            await asyncio.sleep(0)


async def written(folder: Path, *states: KeptState) -> None:
    async with opened(folder) as cache:
        for each in states:
            cache.store(each)


async def test_what_one_cache_wrote_the_next_one_finds_the_longest_first(tmp_path: Path) -> None:
    await written(tmp_path / "new", state(100), state(200), state(300, 7))
    async with opened(tmp_path / "new") as cache:
        counts = [cache.longest(tokens(count), "w") for count in (100, 101, 150, 200, 201, 500)]
        assert counts == [0, 100, 100, 100, 200, 200], "a proper prefix: something must be left to draw from"
        assert cache.longest(tokens(301, 7), "w") == 300
        assert cache.longest(tokens(301, 8), "w") == 0
        assert await cache.fetch(tokens(200), "w") == state(200)


async def test_a_state_of_other_weights_or_another_build_is_not_found(tmp_path: Path) -> None:
    await written(tmp_path, state(100))
    async with opened(tmp_path) as cache:
        assert cache.longest(tokens(200), "other") == 0
    async with opened(tmp_path, build="other") as cache:
        assert cache.longest(tokens(200), "w") == 0


async def test_few_tokens_are_not_worth_a_file(tmp_path: Path) -> None:
    await written(tmp_path, state(TOKENS_MIN - 1), state(TOKENS_MIN))
    assert len([*tmp_path.iterdir()]) == 1


async def test_what_waits_to_be_written_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = len(state(100).packed) + len(tokens(100)) + 4096
    monkeypatch.setattr(state_cache, "_QUEUED_BYTES_MAX", one)
    async with opened(tmp_path) as cache:
        hold = threading.Event()
        cache._writer.submit(hold.wait)
        cache.store(state(100))
        cache.store(state(200))
        hold.set()
        await cache.open()
        assert cache.longest(tokens(300), "w") == 100
        cache.store(state(100, 7))
    assert len([*tmp_path.iterdir()]) == 2, "there is room again"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def vanish(path: Path) -> None:
    path.unlink()


def replace(other: KeptState) -> Callable[[Path], None]:
    return lambda path: write_state(path, other)


def become_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def point_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (cut, "damaged"),
        (flip, "damaged"),
        (lambda path: path.write_bytes(b""), "not a saved state"),
        (lambda path: path.write_bytes(b"notes"), "not a saved state"),
        (vanish, "No such file"),
        (replace(state(100, 5)), "of other tokens"),
        (replace(state(99)), "of other tokens"),
        (replace(state(100, weights="v")), "saved with other weights"),
        (replace(KeptState("old", ("w",), tokens(100), bytearray())), "saved by build old"),
        (replace(KeptState("build", ("v", "w"), tokens(100), bytearray())), "of other tokens"),
        (become_a_directory, "Is a directory"),
        (point_to_itself, "Too many levels"),
    ],
)
async def test_a_file_that_is_not_what_it_was_is_refused_with_the_reason_and_asked_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], why: str
) -> None:
    await written(tmp_path, state(100))
    async with opened(tmp_path) as cache:
        assert cache.longest(tokens(101), "w") == 100
        damage(next(tmp_path.iterdir()))
        assert await cache.fetch(tokens(100), "w") is None
        assert why in caplog.text
        assert "computed again" in caplog.text
        assert cache.longest(tokens(101), "w") == 0
        cache.store(state(100))
    if damage is not become_a_directory:
        async with opened(tmp_path) as cache:
            assert await cache.fetch(tokens(100), "w") == state(100), "it may come back"


async def test_a_file_that_hangs_holds_up_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_cache, "_READ_S_MAX", 0.05)
    await written(tmp_path, state(100), state(200))
    async with opened(tmp_path) as cache:
        path = next(path for path in tmp_path.iterdir() if "-100-" in path.name)
        path.unlink()
        os.mkfifo(path)
        assert await cache.fetch(tokens(100), "w") is None
        assert "silent" in caplog.text
        assert cache.longest(tokens(300), "w") == 0, "not asked while it hangs"
        await asyncio.to_thread(path.write_bytes, b"")
        await until(lambda: cache.longest(tokens(300), "w") > 0)
        assert cache.longest(tokens(300), "w") == 200
    async with opened(tmp_path) as cache:
        os.mkfifo(tmp_path / f"{'0' * 16}-100-{'0' * 32}.kv")
        await cache.open()
        assert cache.longest(tokens(300), "w") == 200


async def test_a_directory_that_vanishes_is_empty_and_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    await written(folder, state(100))
    async with opened(folder) as cache:
        shutil.rmtree(folder)
        assert await cache.fetch(tokens(100), "w") is None
        cache.store(state(200))
        await cache.open()
        assert cache.longest(tokens(300), "w") == 200
        shutil.rmtree(folder)
        cache.store(state(200))
        await cache.open()
        assert await cache.fetch(tokens(200), "w") == state(200)


@pytest.mark.parametrize(
    ("place", "why"),
    [("file", "File exists"), ("file/below", "Not a directory"), ("open", "mode 777"), ("of a group", "mode 770")],
)
async def test_a_directory_that_can_never_do_is_refused_with_the_reason(tmp_path: Path, place: str, why: str) -> None:
    (tmp_path / "file").write_text("")
    for name, mode in {"open": 0o777, "of a group": 0o770}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    for cache in (StateCache(tmp_path / place, MIB, "build"), EmbeddedEngine(cache=tmp_path / place)):
        with pytest.raises(RequestError, match=rf"{tmp_path / place}.*{why}.*DSEC_ENGINE_CACHE"):
            await cache.open()


async def test_a_directory_that_goes_wrong_is_said_once_and_changes_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with opened(tmp_path / "file") as cache:
        (tmp_path / "file").rmdir()
        (tmp_path / "file").write_text("")
        for first in range(3):
            cache.store(state(100, first))
        await cache.close([state(100, 3)])
        assert cache.longest(tokens(200), "w") == 0
    assert caplog.text.count("not kept on disk") == 1


async def test_what_others_keep_there_stays_and_what_was_left_half_written_goes(tmp_path: Path) -> None:
    foreign = ("notes.txt", "a.kv", f"{'g' * 16}-100-{'0' * 32}.kv", ".hidden")
    left = f".{'0' * 16}-100-{'0' * 32}.kv.abc"
    fresh = f".{'0' * 16}-100-{'0' * 32}.kv.def"
    for name in (*foreign, left, fresh):
        (tmp_path / name).write_bytes(bytes(MIB))
    long_ago = time.time() - 10_000
    os.utime(tmp_path / left, (long_ago, long_ago))
    await written(tmp_path, *(state(100, first, size=200_000) for first in range(20)))
    names = {path.name for path in tmp_path.iterdir()}
    assert {*foreign, fresh} <= names
    assert left not in names


async def test_two_on_one_directory_see_each_other_and_keep_it_bounded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_cache, "_LOOK_S", 0.0)
    async with opened(tmp_path) as one, opened(tmp_path) as other:
        one.store(state(100))
        other.store(state(100))
        await one.open()
        await until(lambda: other.longest(tokens(101), "w") > 0)
        assert await other.fetch(tokens(100), "w") == state(100)
        for first in range(40):
            (one, other)[first % 2].store(state(100, first, size=100_000))
    async with opened(tmp_path):
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= MIB


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["store", "fetch", "reopen"]), st.integers(0, 5), st.integers(0, 60_000)),
        max_size=25,
    )
)
@settings(max_examples=40, deadline=None)
def test_the_bound_holds_after_every_step_and_what_is_found_is_right(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    folder, bytes_max = tmp_path_factory.mktemp("cache"), 150_000

    async def check() -> None:
        cache = StateCache(folder, bytes_max, "build")
        await cache.open()
        stored: list[KeptState] = []
        for what, first, size in steps:
            if what == "store":
                stored.append(state(100, first, size=size))
                cache.store(stored[-1])
                await cache.open()
                assert cache.longest(tokens(101, first), "w") == 100
            elif what == "fetch" and cache.longest(tokens(101, first), "w"):
                assert await cache.fetch(tokens(100, first), "w") in stored
            elif what == "reopen":
                await cache.close()
                cache = StateCache(folder, bytes_max, "build")
                await cache.open()
            assert sum(path.stat().st_size for path in folder.iterdir()) <= bytes_max
        await cache.close()

    asyncio.run(check())


async def test_what_was_used_longest_ago_goes_first_also_after_a_restart(tmp_path: Path) -> None:
    await written(tmp_path, *(state(100, first, size=200_000) for first in range(4)))
    long_ago = time.time() - 1000
    for path in tmp_path.iterdir():
        os.utime(path, (long_ago, long_ago))
    async with opened(tmp_path) as cache:
        assert await cache.fetch(tokens(100, 2), "w") is not None
        await cache.close([state(100, 9, size=300_000)])
    async with opened(tmp_path) as cache:
        found = [first for first in (0, 1, 2, 3, 9) if cache.longest(tokens(101, first), "w")]
    assert {2, 9} <= set(found)
    assert len(found) < 5


async def test_a_write_that_hangs_holds_up_no_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_cache, "_CLOSE_S_MAX", 0.05)
    cache, goes_on, is_over = StateCache(tmp_path, MIB, "build"), threading.Event(), threading.Event()
    await cache.open()
    cache._writer.submit(lambda: goes_on.wait() and None)
    cache._writer.submit(is_over.set)
    await cache.close([state(100)])
    assert "not all states were written within 0.05 s" in caplog.text
    assert not is_over.is_set()
    goes_on.set()
    assert await asyncio.to_thread(is_over.wait, 60), "it goes on if it can"


HANGING = """
import asyncio, os, sys, threading
from pathlib import Path
from rollout.engines import state_cache
from rollout.engines.kept_state import KeptState
from rollout.engines.state_cache import StateCache

async def main(folder):
    cache = StateCache(folder, 1 << 20, "build")
    await cache.open()
    cache.store(KeptState("build", ("w",), bytes(400), bytearray(1000)))
    await cache.close()
    (path,) = folder.iterdir()
    path.unlink()
    os.mkfifo(path)
    cache = StateCache(folder, 1 << 20, "build")
    assert await cache.fetch(bytes(400), "w") is None
    state_cache.write_state, state_cache._CLOSE_S_MAX = (lambda *_: threading.Event().wait()), 0.05
    cache.store(KeptState("build", ("w",), bytes(800), bytearray(1000)))
    await cache.close()

asyncio.run(main(Path(sys.argv[1])))
"""


def test_a_disk_that_hangs_keeps_no_process_from_its_end(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", HANGING, tmp_path / "states"], check=True, timeout=60)
