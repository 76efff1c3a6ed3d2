"""Every knob of the rollout service is told on the page for whoever serves it."""

from pathlib import Path

from pydantic_settings import BaseSettings

from rollout.config import RolloutConfig, WorkerConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text()


def test_docs_serving_names_every_knob() -> None:
    kinds: tuple[type[BaseSettings], ...] = (RolloutConfig, WorkerConfig)
    knobs = [f"{kind.model_config['env_prefix']}{name.upper()}" for kind in kinds for name in kind.model_fields]
    assert [knob for knob in knobs if f"`{knob}`" not in PAGE] == []
