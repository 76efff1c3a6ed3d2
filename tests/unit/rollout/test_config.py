"""Knobs of a service: what the environment says holds where the command line says nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from rollout.commands.run import _bounds, given_knobs
from rollout.config import RolloutConfig, misspelt
from rollout.engines.pool import EnginePool
from rollout.errors import RequestError
from rollout.main import STATES, make_engine


def test_lists_and_objects_are_read_as_people_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("my.rewards:one, my.rewards:two", '["my.rewards:one", "my.rewards:two"]'):
        monkeypatch.setenv("DSEC_REWARD_CALLABLES", text)
        assert RolloutConfig().reward_callables == {"my.rewards:one", "my.rewards:two"}
    monkeypatch.setenv("DSEC_REWARD_CALLABLES", "")
    monkeypatch.setenv("DSEC_PROJECT_WEIGHTS", '{"main": 2}')
    config = RolloutConfig()
    assert (config.reward_callables, config.project_weights) == (frozenset(), {"main": 2.0})


def test_states_lie_where_the_environment_says_or_beside_the_log_or_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_engine(RolloutConfig()).cache is None
    assert make_engine(RolloutConfig(), tmp_path / STATES).cache == tmp_path / "states"
    monkeypatch.setenv("DSEC_ENGINE_CACHE", "")
    assert make_engine(RolloutConfig()).cache is None
    monkeypatch.setenv("DSEC_ENGINE_CACHE", "/var/cache/dsec")
    assert make_engine(RolloutConfig(), tmp_path).cache == Path("/var/cache/dsec")
    monkeypatch.setenv("DSEC_ENGINE_CACHE_BYTES_MAX", "0")
    assert make_engine(RolloutConfig(), tmp_path).cache is None


def test_engines_are_one_url_after_the_other_and_a_key_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RolloutConfig(engines=("embedded",)).engines == ()
    monkeypatch.setenv("DSEC_ENGINES", "http://a:1/ https://b/v, http://c:2")
    monkeypatch.setenv("DSEC_ENGINE_KEY", "secret of an engine")
    config = RolloutConfig()
    assert config.engines == ("http://a:1", "https://b/v", "http://c:2")
    assert "secret" not in repr(config)
    assert isinstance(make_engine(config), EnginePool)
    for urls in (("http://a:1", "http://a:1/"), ("unix:/a",), ("http://user:pw@a",), ("http://",), ("http://a:1/?x",)):
        with pytest.raises(RequestError, match=r"--engine|is no engine") as refused:
            make_engine(RolloutConfig(engines=urls))
        assert "pw" not in str(refused.value)


def test_newer_weights_are_a_version_and_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, read in (("8:/srv/it:8", (8, Path("/srv/it:8"))), ("", None)):
        monkeypatch.setenv("DSEC_NEWER_WEIGHTS", text)
        assert RolloutConfig().newer_weights == read
    for text in ("/srv/8", "0:/srv/0", "-1:/srv", "8:srv", "8", "²:/srv"):
        monkeypatch.setenv("DSEC_NEWER_WEIGHTS", text)
        with pytest.raises(ValidationError, match="write VERSION:DIR"):
            RolloutConfig()


def test_the_bounds_of_a_run_are_the_environments_where_it_says_something(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(concurrency: int | None, group_size: int) -> tuple[int, int, int]:
        bounds = _bounds(given_knobs(concurrency=concurrency), group_size)
        return bounds.concurrency, bounds.sandboxes_count_max, bounds.sandboxes_asleep_count_max

    assert told(None, 4) == (16, 16, 0)
    assert told(20, 64) == (20, 64, 0)
    monkeypatch.setenv("DSEC_CONCURRENCY", "7")
    assert told(None, 4) == (7, 7, 0)
    assert told(20, 4) == (20, 20, 0)
    monkeypatch.setenv("DSEC_SANDBOXES_COUNT_MAX", "99")
    assert told(None, 4) == (7, 99, 0)


@pytest.mark.parametrize(
    ("variable", "knob"),
    [
        ("DSEC_ENGINE_THREAD_COUNT", "DSEC_ENGINE_THREADS_COUNT"),
        ("DSEC_TOKENISER", "DSEC_TOKENIZER"),
        ("DSEC_CHECKPOINT_ROOT", "DSEC_CHECKPOINTS_ROOT"),
        ("DSEC_WORKER_GRACE", "DSEC_WORKER_GRACE_S"),
    ],
)
def test_a_variable_that_is_nearly_a_knob_is_told_of_where_a_service_begins(
    variable: str, knob: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(variable, "1")
    make_engine(RolloutConfig())
    assert caplog.messages == [f"nobody reads the environment variable {variable}: was {knob} meant?"]


def test_no_variable_that_the_documents_name_passes_for_a_misspelt_one() -> None:
    root = Path(__file__).resolve().parents[3]
    pages = [root / "README.md", *(root / "docs").rglob("*.md")]
    named = {name for page in pages for name in re.findall(r"DSEC_[A-Z_]*[A-Z]\b", page.read_text())}
    assert len(named) > 50
    assert misspelt(named) == {}
