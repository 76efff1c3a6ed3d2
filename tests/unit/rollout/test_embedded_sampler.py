"""The sampler: the right distribution, its logprobs, and noise that depends on position alone."""

import math
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from rollout.engine import Sampling
from rollout.engines.embedded.binding import Model
from rollout.engines.embedded.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    model = Model(load_checkpoint())
    yield model
    model.close()


@pytest.fixture
def logits(model: Model) -> list[float]:
    source = random.Random(5)
    values = [source.gauss(0, 1) for _ in range(model.dimensions.vocab_count)]
    for token_id, value in ((100, 9.0), (200, 8.5), (300, 8.0), (4000, 7.0), (50, 6.0)):
        values[token_id] = value
    return values


def softmax(logits: list[float], temperature: float) -> list[float]:
    top = max(logits)
    weights = [math.exp((value - top) / temperature) for value in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def processed(logits: list[float], sampling: Sampling) -> dict[int, float]:
    """Reference: temperature, then top-k, then top-p over what is left; lower ids win ties."""
    shares = softmax(logits, sampling.temperature)
    order = sorted(range(len(shares)), key=lambda i: (-shares[i], i))[: sampling.top_k or None]
    total, kept, mass = math.fsum(shares[i] for i in order), [], 0.0
    for i in order:
        if kept and mass >= sampling.top_p * total:
            break
        kept.append(i)
        mass += shares[i]
    return {i: shares[i] / mass for i in kept}


CUTS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.5, seed=1),
    Sampling(temperature=1.0, top_k=3, seed=2),
    Sampling(temperature=1.0, top_p=0.5, seed=3),
    Sampling(temperature=1.5, top_k=40, top_p=0.7, seed=4),
    Sampling(temperature=1.0, top_k=1, seed=5),
    Sampling(temperature=1.0, top_p=0.001, seed=6),
]


@pytest.mark.parametrize("sampling", CUTS, ids=str)
def test_tokens_come_from_the_processed_distribution_with_its_logprobs(
    model: Model, logits: list[float], sampling: Sampling
) -> None:
    expected = processed(logits, sampling)
    drawn = [model.sample(logits, sampling, 7, position) for position in range(200)]
    for token in drawn:
        assert token.token_id in expected
        assert token.logprob == pytest.approx(math.log(expected[token.token_id]), abs=2e-5)


@pytest.mark.parametrize("sampling", CUTS[2:5], ids=str)
def test_counts_over_many_positions_match_the_probabilities(
    model: Model, logits: list[float], sampling: Sampling
) -> None:
    """Chi-squared over the kept tokens stays below 4 standard deviations above its mean (fixed seed)."""
    few = {i: logits[i] for i in processed(logits, sampling)}
    expected = processed(logits, sampling)
    counts = Counter(model.sample(logits, sampling, 99, position).token_id for position in range(2000))
    chi2 = sum((counts[i] - 2000 * p) ** 2 / (2000 * p) for i, p in expected.items())
    freedom = len(few) - 1
    assert set(counts) <= set(few)
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_greedy_takes_the_highest_logit_and_the_lowest_id_of_equals(model: Model, logits: list[float]) -> None:
    greedy = Sampling()
    drawn = model.sample(logits, greedy, 0, 0)
    assert drawn.token_id == 100
    assert drawn.logprob == pytest.approx(math.log(softmax(logits, 1.0)[100]), abs=2e-6)
    logits[3000] = logits[20] = 9.0
    assert model.sample(logits, greedy, 0, 0).token_id == 20


def test_a_cut_through_equal_logits_keeps_the_lower_ids(model: Model) -> None:
    flat = [0.0] * model.dimensions.vocab_count
    seen = {model.sample(flat, Sampling(temperature=1.0, top_k=4), 1, position).token_id for position in range(200)}
    assert seen == {0, 1, 2, 3}


def test_noise_is_a_function_of_seed_stream_and_position(model: Model) -> None:
    flat = [0.0] * model.dimensions.vocab_count

    def draw(seed: int, stream_key: int) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return [model.sample(flat, sampling, stream_key, position).token_id for position in range(50)]

    base = draw(1, 2)
    assert draw(1, 2) == base
    others = [draw(2, 1), draw(1, 3), draw(2, 2), draw(1 + 2**32, 2), draw(1, 2 + 2**40)]
    for other in others:
        assert sum(a == b for a, b in zip(base, other, strict=True)) <= 2
    assert draw(1 + 2**64, 2) == base, "seeds count modulo 2**64"


def test_the_noise_is_philox_as_published(model: Model) -> None:
    """Uniform draws of a 10-round Philox4x32, recomputed here from its paper, pick the same flat ids."""
    count = model.dimensions.vocab_count
    flat, mask = [0.0] * count, 2**32 - 1
    for seed, stream_key, position in ((0, 0, 0), (2**63 + 5, 2**40 + 9, 1999), (17, 3, 77)):
        x, key = [position, 0, stream_key & mask, stream_key >> 32], [seed & mask, seed >> 32]
        for _ in range(10):
            a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
            x = [(b >> 32) ^ x[1] ^ key[0], b & mask, (a >> 32) ^ x[3] ^ key[1], a & mask]
            key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
        u = ((x[0] >> 5) * 2**26 + (x[1] >> 6)) / 2**53
        drawn = model.sample(flat, Sampling(temperature=1.0, seed=seed), stream_key, position)
        assert drawn.token_id == int(u * count)


ODD = (math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, 1e-46, 1e-39, 1e-6, 1.0, 1e30, 1e39, 1e308, -1.0)
SPREADS = {
    "far": (3.4e38, -3.4e38, 0.0),
    "infinite": (math.inf, -math.inf, 1.0),
    "not numbers": (math.nan, 2.0, 1.0),
    "only NaN": (math.nan,),
    "only -inf": (-math.inf,),
    "only inf": (math.inf,),
    "subnormal": (1e-45, -1e-45),
}


@pytest.mark.parametrize("spread", SPREADS)
def test_every_logprob_is_finite_whatever_floats_come_in(model: Model, spread: str) -> None:
    count = model.dimensions.vocab_count
    logits = [SPREADS[spread][i % len(SPREADS[spread])] for i in range(count)]
    for temperature in ODD:
        for top_p, top_k in ((1.0, 0), (math.nan, 0), (5e-324, 7), (-1.0, 0), (math.inf, 3), (0.9, -5), (0.9, 9)):
            sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
            for position in range(3):
                drawn = model.sample(logits, sampling, 3, position)
                assert 0 <= drawn.token_id < count
                assert math.isfinite(drawn.logprob), sampling
                assert drawn.logprob <= 0


def test_a_tiny_temperature_and_far_logits_stay_finite(model: Model) -> None:
    logits = [-3e38] * model.dimensions.vocab_count
    logits[7] = 3e38
    for sampling in (Sampling(temperature=1e-6), Sampling(temperature=1.0, top_p=0.9), Sampling()):
        drawn = model.sample(logits, sampling, 0, 3)
        assert (drawn.token_id, drawn.logprob) == (7, 0.0)
