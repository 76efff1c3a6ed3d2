"""What a trainer writes anew into config.json makes no other model of a checkpoint, at either kind of engine."""

import json
from pathlib import Path
from typing import Any

import pytest

from rollout.engines.config_fields import WITHOUT_EFFECT
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT
from rollout.engines.embedded.config import read_dimensions
from rollout.engines.vllm.testing import write_checkpoint
from rollout.engines.vllm.weights import READ_AT_START, check_fits, read_weights
from rollout.errors import EngineError

SERVED: dict[str, Any] = json.loads((DEFAULT_CHECKPOINT / "config.json").read_text())
RESAVED: dict[str, Any] = {
    "_name_or_path": "/runs/7/step-40",
    "_attn_implementation_autoset": True,
    "transformers_version": "5.9.0",
    "router_aux_loss_coef": 0.02,
    "output_router_logits": True,
    "router_jitter_noise": 0.1,
    "attention_dropout": 0.1,
    "initializer_range": 0.01,
    "use_cache": False,
    "output_hidden_states": True,
    "return_dict": False,
    "id2label": {"0": "worse", "1": "better"},
    "label2id": {"worse": 0, "better": 1},
    "problem_type": "regression",
    "pad_token_id": 2,
    "eos_token_id": [1, 3],
}
"""What a trainer of a mixture of experts sets, and transformers adds."""
OTHERWISE: dict[str, Any] = dict.fromkeys(RESAVED, None) | {
    "transformers_version": "4.57.0",
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
    "router_jitter_noise": 0.0,
    "use_cache": True,
    "id2label": {"0": "LABEL_0"},
}


def written(folder: Path, number: int, config: dict[str, Any]) -> Path:
    write_checkpoint(folder, number)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("nested", [False, True])
def test_a_checkpoint_that_a_moe_trainer_saved_anew_is_taken_and_the_same_weights(
    tmp_path: Path, *, nested: bool
) -> None:
    def said(fields: dict[str, Any]) -> dict[str, Any]:
        return {"model_type": "two", "text_config": SERVED | fields} if nested else SERVED | fields

    old = read_weights(written(tmp_path / "old", 1, said(OTHERWISE)))
    folder = written(tmp_path / "new", 1, said(RESAVED))
    new = read_weights(folder)
    check_fits(folder, new, old)
    assert new.digest == old.digest
    other = read_weights(written(tmp_path / "other", 2, said(RESAVED)))
    check_fits(tmp_path / "other", other, old)
    assert other.digest != old.digest


def test_the_embedded_engine_reads_the_same_numbers_from_a_config_that_was_saved_anew() -> None:
    read = [read_dimensions(Path("config.json"), SERVED | each, None) for each in ({}, OTHERWISE, RESAVED)]
    assert read == [read[0]] * 3


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_a_field_that_decides_no_token_keeps_no_checkpoint_out(tmp_path: Path, name: str) -> None:
    folders = [written(tmp_path / value, 1, SERVED | {name: value}) for value in ("one", "two")]
    one, two = map(read_weights, folders)
    check_fits(folders[1], two, one)
    assert (one.digest != two.digest) == (name in READ_AT_START), "a server that starts with it is built by it"
    read = [read_dimensions(Path("config.json"), each.config, None) for each in (one, two)]
    assert read[0] == read[1]


@pytest.mark.parametrize("name", ["routed_scaling_factor", "rms_norm_eps", "num_experts_per_tok", "model_type"])
def test_a_field_that_decides_tokens_does(tmp_path: Path, name: str) -> None:
    folders = [written(tmp_path / str(value), 1, SERVED | {name: value}) for value in (1, 2)]
    one, two = map(read_weights, folders)
    assert one.digest != two.digest
    with pytest.raises(EngineError, match=rf"says otherwise of {name}, and"):
        check_fits(folders[1], two, one)
