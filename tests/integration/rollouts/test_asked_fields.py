"""Big fields that a job asks for: what comes back, what does not, and what is refused instead of being empty."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from rollout.engine import Sampling
from rollout.errors import ConflictError, RequestError

CUT = Sampling(temperature=1.0, top_p=0.5, seed=1)


def rows(offsets: Any, *columns: Any) -> list[list[Any]]:
    return [[column[start:end].tolist() for column in columns] for start, end in pairwise(offsets)]


async def test_the_likeliest_tokens_and_the_sampling_mask_lie_beside_the_tokens_they_are_of(setting: Any) -> None:
    asked = {"fields": ("tokens", "topk", "sampling_mask"), "top_logprobs_count": 2, "sampling": CUT}
    (group,) = await setting.groups("one", **asked)
    (said,) = group.trajectories
    ids, sampled = said.token_ids.tolist(), said.loss_mask.tolist()
    assert 0 < sum(sampled) < len(ids)
    assert rows(*said.topk) == [
        [[i], [-0.5]] if is_drawn else [[], []] for i, is_drawn in zip(ids, sampled, strict=True)
    ]
    assert rows(*said.sampling_mask) == [[[i]] if is_drawn else [[]] for i, is_drawn in zip(ids, sampled, strict=True)]
    light = await setting.client.get(said.rollout_id, ["tokens"])
    assert [len(column) for column in (*light.topk, *light.sampling_mask)] == [0] * 5


async def test_without_a_cut_a_sampling_mask_has_no_ids(setting: Any) -> None:
    (group,) = await setting.groups("one", fields=("tokens", "sampling_mask"))
    (said,) = group.trajectories
    assert rows(*said.sampling_mask) == [[[]]] * len(said.token_ids)


@pytest.mark.parametrize("name", ["topk", "sampling_mask", "routes", "hidden"])
async def test_what_a_job_did_not_ask_for_is_refused_not_empty(setting: Any, name: Any) -> None:
    await setting.job("plain")
    said = f"job 'plain' has no FIELD_{name.upper()}: Submit must name it"
    with pytest.raises(RequestError, match=said):
        await setting.client.get("plain/one.0", [name])
    for stream in (setting.client.attach("plain", 0, [name]), setting.client.replay("plain/one.0", 0, [name])):
        with pytest.raises(RequestError, match=said):
            await anext(stream)
    with pytest.raises(RequestError if name == "topk" else ConflictError):
        await setting.job("plain", fields=("tokens", name))


async def test_what_can_never_be_told_is_refused_before_anything_is_logged(setting: Any) -> None:
    for asked, why in (
        ({"fields": ["topk"]}, "no FIELD_TOPK: Submit must name it"),
        ({"top_logprobs_count": 33}, "top_logprobs_count must be 0 to 32"),
    ):
        with pytest.raises(RequestError, match=why):
            await setting.job(**asked)
    assert setting.service.ledger.jobs == {}
