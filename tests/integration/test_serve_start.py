"""`dsec serve` before it serves: what does not suit is refused at once, and a signal ends a start that waits."""

import signal
import socket
from pathlib import Path
from typing import Any

import pytest

HERE = "127.0.0.1:0"


@pytest.mark.parametrize("where", ["--out", "--root"])
def test_an_engine_whose_contexts_are_too_short_is_refused_before_anything_is_served(
    dsec: Any, tmp_path: Path, where: str
) -> None:
    environment = {"DSEC_CONTEXT_TOKENS_COUNT_MAX": "5000"}
    process = dsec.start("serve", where, tmp_path / "served", "--listen", HERE, env=environment)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert "DSEC_CONTEXT_TOKENS_COUNT_MAX is 5000, and a context of the engine embedded holds 2048 tokens" in err


def test_a_signal_ends_a_start_that_waits_for_its_engine(dsec: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        engine = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = dsec.start("serve", "--out", tmp_path / "served", "--listen", HERE, "--engine", engine)
        silent.settimeout(60)
        connection, _ = silent.accept()
        with connection:
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, "", "dsec: stopped before it served\n")
