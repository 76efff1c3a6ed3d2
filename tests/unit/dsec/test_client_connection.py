"""What a caller hears while an Edge does not answer, and in the end."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dsec.client import connection
from dsec.client.connection import Patience, Retry, connect
from dsec.errors import UnreachableError
from dsec.pb.v1 import edge_pb2 as pb


@pytest.mark.parametrize(("setting", "way"), [("", "set DSEC_API_URL"), ("unix:/else", "correct DSEC_API_URL")])
async def test_no_edge_is_said_in_the_kernels_words_and_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, way: str
) -> None:
    monkeypatch.setenv("DSEC_API_URL", setting)
    asked = connect(f"unix:{tmp_path}/none")
    with pytest.raises(UnreachableError) as raised:
        await asked.call("GetHost", pb.GetHostRequest(), patience=Patience(connect_s=0.0))
    await asked.close()
    said = str(raised.value)
    assert said.startswith(f"no Edge answers at unix:{tmp_path}/none (No such file or directory): ")
    assert said.endswith(way)


async def test_who_asks_for_long_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "_TELL_S", 0.0)
    asked = connect(f"unix:{tmp_path}/none")
    retry = Retry(asked, Patience())
    with caplog.at_level(logging.WARNING, "dsec"):
        for _ in range(3):
            await retry.wait_or_raise(UnreachableError("broken"))
    await asked.close()
    (said,) = caplog.messages
    assert said.startswith(f"no answer from the Edge at unix:{tmp_path}/none: asking again")
