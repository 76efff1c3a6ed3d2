"""`dsec serve` before it serves: what does not suit is refused at once, and a signal ends a start that waits."""

import json
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from rollout.config import RolloutConfig
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT
from rollout.main import make_engine

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


@pytest.mark.parametrize("command", ["serve", "run"])
def test_a_tokenizer_whose_ids_the_embedded_model_was_not_taught_is_refused(
    dsec: Any, tmp_path: Path, command: str
) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    shutil.copy(DEFAULT_CHECKPOINT / "tokenizer.json", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    spelled = {token_id: token for token, token_id in tokenizer["model"]["vocab"].items()}
    tokenizer["model"]["vocab"] |= {spelled[500]: 501, spelled[501]: 500}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    ran = dsec(command, "--out", tmp_path / "out", "--tokenizer", folder)
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert f"{folder / 'tokenizer.json'} is another model's: its ids are not those of the embedded" in ran.err
    assert "--engine" in ran.err


def test_the_same_ids_in_another_file_suit_the_embedded_model(tmp_path: Path) -> None:
    tokenizer = json.loads((DEFAULT_CHECKPOINT / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))  # spaced and escaped in another way
    assert (tmp_path / "tokenizer.json").read_bytes() != (DEFAULT_CHECKPOINT / "tokenizer.json").read_bytes()
    assert make_engine(RolloutConfig(tokenizer=tmp_path)).checkpoint == DEFAULT_CHECKPOINT
