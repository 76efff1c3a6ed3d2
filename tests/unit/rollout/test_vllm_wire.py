"""vLLM's wire as values: what a real server said is read, what no server may say is an error in words."""

import base64
import io
import json
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollout.engine import EngineInfo, Routing, SampleRequest, Sampling
from rollout.engines.vllm import wire
from rollout.engines.vllm.facts import Parallel, _routing
from rollout.engines.vllm.testing import LAYERS, TOP_K, route_of, write_checkpoint
from rollout.engines.vllm.weights import Label, check_fits, parse_label, read_config, read_weights
from rollout.errors import EngineError, RequestError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/vllm/exchanges.json").read_text())
EXCHANGES: dict[str, Any] = {each["name"]: each for each in GOLDEN["exchanges"]}
INFO = EngineInfo(
    name="vllm/x", build="b", weights_digest="", vocab_count=1 << 18, context_tokens_max=64, policy_version=5
)
ROUTING = Routing(layer_ids=tuple(range(LAYERS)), experts_count=8, top_k=TOP_K)


def events(name: str, size: int = 1 << 16) -> list[wire.Event]:
    """What a recorded stream says, read in pieces of a size."""
    data, lines = EXCHANGES[name]["answer"].encode(), wire.Lines(1 << 20)
    payloads = [each for at in range(0, len(data), size) for each in lines.feed(data[at : at + size])]
    assert payloads[-1] == b"[DONE]"
    return [wire.event_of(each) for each in payloads[:-1]]


def tokens(told: list[wire.Event]) -> list[int]:
    return [token for event in told for choice in event.choices for token in choice.token_ids or ()]


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 1 << 20])
def test_a_recorded_stream_says_the_same_in_pieces_of_any_size(size: int) -> None:
    told = events("greedy", size)
    assert told == events("greedy")
    assert len(tokens(told)) == 4
    assert told[-1].usage is not None
    assert [choice.finish_reason for event in told for choice in event.choices][-1] == "length"


def test_recorded_streams_tell_caches_stops_aborts_and_labels() -> None:
    cached = [events(name)[-1].usage for name in ("greedy", "greedy again, from the cache")]
    details = [each.prompt_tokens_details for each in cached if each is not None]
    assert [each.cached_tokens for each in details if each is not None] == [0, 64]
    assert tokens(events("greedy")) == tokens(events("greedy again, from the cache"))
    assert events("stopped")[-2].choices[0].finish_reason == "stop"
    aborted = events("aborted")[-2].choices[0]
    assert (aborted.finish_reason, aborted.token_ids) == ("abort", ())
    labels = events("drawn under a label")[-2].choices[0].weight_versions
    assert [parse_label(each.version) for each in labels or ()] == [Label(3, "a" * 64)]


def test_the_likeliest_are_ordered_counted_and_without_those_that_a_cut_left_no_chance() -> None:
    chunks = [
        wire.sampled_of(each, 4, 0) for event in events("by chance, with the likeliest") for each in event.choices
    ]
    rows = [row for chunk in chunks for row in chunk.top_logprobs]
    assert {len(row.token_ids) for row in rows} == {3}
    assert [list(row.logprobs) for row in rows] == [sorted(row.logprobs, reverse=True) for row in rows]
    assert [row for row in rows if min(row.logprobs) <= -100] == []


def test_a_recorded_score_is_of_all_tokens_but_the_first() -> None:
    exchange = EXCHANGES["score"]
    ids = exchange["body"]["token_ids"]
    scored = wire.scored_of(json.loads(exchange["answer"]), ids, 2, INFO)
    assert len(scored.logprobs) == len(scored.top_logprobs) == len(ids) - 1
    assert [logprob for logprob in scored.logprobs if logprob >= 0] == []
    assert {len(top.token_ids) for top in scored.top_logprobs} == {2}
    assert wire.scored_of(json.loads(exchange["answer"]), ids, 0, INFO).top_logprobs == ()


@pytest.mark.parametrize("name", ["out of vocabulary", "no tokens", "too many logprobs"])
def test_what_the_server_finds_wrong_with_a_request_is_the_callers(name: str) -> None:
    exchange = EXCHANGES[name]
    if exchange["status"] == 200:
        with pytest.raises(RequestError, match="vLLM answered 400: "):
            events(name)
    else:
        error = wire.error_of(exchange["answer"].encode(), exchange["status"])
        assert isinstance(error, RequestError)
        assert str(error).startswith("vLLM answered 400: ")


def test_errors_in_all_their_shapes_are_one_line_without_controls() -> None:
    shapes: tuple[tuple[bytes, int, type[Exception]], ...] = (
        (b'{"error": "Unauthorized"}', 401, EngineError),
        (b'{"detail": "Not Found"}', 404, EngineError),
        (b'{"error": {"message": "Engine\\u001b[2J\\ndied", "code": 500}}', 0, EngineError),
        (b'{"error": {"message": ["deep"], "code": "x"}}', 503, EngineError),
        (b"<html>\x1b]0;bad gateway\x07" + b"x" * 10_000, 502, EngineError),
        (b"[1, 2]", 500, EngineError),
        (b"", 500, EngineError),
        (b'{"error": "\xff\x1b[2J"}', 500, EngineError),
        (b"[" * 100_000, 500, EngineError),
        (b'{"error": {"message": ' + b"[" * 900 + b"]" * 900 + b"}}", 500, EngineError),
        (b'{"error": {"message": "x", "code": ' + b"9" * 4000 + b"}}", 500, EngineError),
        (b'{"error": {"message": "too long", "code": 400}}', 200, RequestError),
    )
    for body, status, kind in shapes:
        error = wire.error_of(body, status)
        assert type(error) is kind, body
        assert str(error).isprintable(), body
        assert len(str(error)) < 500


def test_a_line_that_does_not_end_is_an_error_at_its_bound() -> None:
    lines = wire.Lines(100)
    assert lines.feed(b"data: " + b"x" * 90) == []
    with pytest.raises(EngineError, match="more than 100 bytes"):
        lines.feed(b"x" * 10)
    with pytest.raises(EngineError, match="more than 100 bytes"):
        wire.Lines(100).feed(b"data: " + b"x" * 200 + b"\n")
    assert wire.Lines(100).feed(b": a comment\r\n\r\nevent: x\ndata: {}\r\ndata:[DONE]\n") == [b"{}", b"[DONE]"]


NOISE: tuple[Callable[[], Any], ...] = (
    lambda: wire.event_of(b"{"),
    lambda: wire.event_of(b"[]"),
    lambda: wire.event_of(b'{"choices": [{"finish_reason": "\xff"}]}'),
    lambda: wire.event_of(b'{"error": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    lambda: wire.event_of(b'{"who knows": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    lambda: wire.event_of(b'{"choices": [{"token_ids": ["1"]}]}'),
    lambda: wire.event_of(b'{"choices": [{"token_ids": [1.5]}]}'),
    lambda: wire.event_of(b'{"choices": [{"logprobs": {"content": [{"token_id": 1, "logprob": NaN}]}}]}'),
    lambda: wire.sampled_of(wire.Choice(token_ids=(1,)), 0, 0),
    lambda: wire.sampled_of(wire.Choice(token_ids=(1,), logprobs=wire.Logprobs((wire.Drawn(2, -1.0),))), 0, 0),
    lambda: wire.sampled_of(wire.Choice(token_ids=(1,), logprobs=wire.Logprobs((wire.Drawn(1, -9999.0),))), 0, 0),
    lambda: wire.scored_of({"prompt_logprobs": [None]}, (1, 2), 0, INFO),
    lambda: wire.scored_of({"prompt_logprobs": [None, {"3": {"logprob": -1.0}}]}, (1, 2), 0, INFO),
    lambda: wire.scored_of({"prompt_logprobs": [None, {"2": {"logprob": "x"}}]}, (1, 2), 0, INFO),
    lambda: wire.scored_of({"prompt_logprobs": [None, {"2": {"logprob": -(10**400)}}]}, (1, 2), 0, INFO),
    lambda: wire.scored_of({"prompt_logprobs": [None, [1]]}, (1, 2), 0, INFO),
    lambda: wire.scored_of({"prompt_logprobs": [None, {"2": {"logprob": 0.5}}]}, (1, 2), 0, INFO),
    lambda: wire.scored_of({"prompt_logprobs": [None, {"2": {"logprob": math.nan}}]}, (1, 2), 0, INFO),
    lambda: wire.scored_of(
        {"prompt_logprobs": [None, {"2": {"logprob": -1.0}, "3": {"logprob": 1e300}}]}, (1, 2), 2, INFO
    ),
    lambda: wire.scored_of(
        {"prompt_logprobs": [None, {"2": {"logprob": -1.0}, "-3": {"logprob": -1.0}}]}, (1, 2), 2, INFO
    ),
    lambda: wire.scored_of(
        {"prompt_logprobs": [None, {"2": {"logprob": -1.0}, str(INFO.vocab_count): {"logprob": -1.0}}]},
        (1, 2),
        2,
        INFO,
    ),
    lambda: wire.scored_of([], (1, 2), 0, INFO),
)


@pytest.mark.parametrize("read", NOISE)
def test_what_no_server_may_say_is_an_engine_error(read: Callable[[], Any]) -> None:
    with pytest.raises(EngineError):
        read()


def test_routes_are_read_at_their_width_and_nothing_else_passes_for_them() -> None:
    def npy(rows: bytes, shape: object, kind: str = "|u1") -> str:
        header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
        return base64.b64encode(head + rows).decode()

    rows = b"".join(map(route_of, (5, 6, 7)))
    assert wire.routes_of(npy(rows, (3, LAYERS, TOP_K)), 4, 7, ROUTING).expert_ids == rows
    wide = b"".join(struct.pack("<i", each) for each in rows)
    assert wire.routes_of(npy(wide, (3, LAYERS, TOP_K), "<i4"), 4, 7, ROUTING).expert_ids == rows
    for text in (
        "",
        "!",
        base64.b64encode(b"\x93NUMPY\x01\x00").decode(),
        base64.b64encode(b"\x80\x04\x95").decode(),  # a pickle
        npy(rows, (3, LAYERS, TOP_K))[:-40],
        npy(rows[TOP_K * LAYERS :], (2, LAYERS, TOP_K)),
        npy(rows, (3, TOP_K, LAYERS)),
        npy(b"\xff" * len(rows), (3, LAYERS, TOP_K)),
        npy(bytes(4 * len(rows)), (3, LAYERS, TOP_K), "<f4"),
        npy(bytes(8 * len(rows)), (3, LAYERS, TOP_K), "|O"),
        npy(rows, (1 << 50, LAYERS, TOP_K)),
        npy(rows, (10**30, LAYERS, TOP_K)),
        npy(rows, (-3, LAYERS, TOP_K)),
        npy(rows, "-" * 9000 + "1"),
        npy(rows, "(" * 9000),
        base64.b64encode(b"PK\x03\x04" + bytes(100)).decode(),
        base64.b64encode(empty_zip()).decode(),
    ):
        with pytest.raises(EngineError, match="routed_experts"):
            wire.routes_of(text, 4, 7, ROUTING)


def test_rows_of_routes_that_have_no_meaning_are_not_told() -> None:
    described = {"num_experts": 8, "num_hidden_layers": LAYERS}
    for shape, is_known in (
        ((1, LAYERS, TOP_K), True),
        ((1, LAYERS, 0), False),
        ((1, 0, 2), False),
        ((1, 1, 9), False),
    ):
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        rows = bytes(math.prod(shape))
        text = base64.b64encode(b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + header.encode() + rows).decode()
        assert (_routing({"routed_experts": text}, described) is not None) == is_known


def empty_zip() -> bytes:
    """What numpy takes for a .npz."""
    file = io.BytesIO()
    zipfile.ZipFile(file, "w").close()
    return file.getvalue()


def test_a_stream_keeps_its_seed_and_others_have_others() -> None:
    seeds = {wire.seed_of(seed, key) for seed in range(20) for key in range(20)}
    assert len(seeds) == 400
    assert wire.seed_of(3, 7) == wire.seed_of(3, 7)
    assert [each for each in seeds if not 0 <= each < 1 << 63] == []


def test_a_body_leaves_nothing_to_the_servers_own_defaults() -> None:
    request = SampleRequest(
        session="s",
        token_ids=(1, 2),
        sampling=Sampling(temperature=0.5, top_p=0.9, top_k=7, seed=1),
        stream_key=2,
        tokens_count_max=9,
        stop_ids=frozenset({5, 3}),
        priority=4,
        top_logprobs_count=2,
    )
    body = wire.body_of(request, "id", 8, "salt", has_priorities=True)
    assert (body["priority"], body["cache_salt"], body["token_ids"]) == (-4, "salt", (1, 2))
    assert body["sampling_params"] == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "seed": wire.seed_of(1, 2),
        "max_tokens": 8,
        "stop_token_ids": [3, 5],
        "ignore_eos": True,
        "detokenize": False,
        "logprobs": 3,
    }
    assert wire.body_of(request, "id", 8, "salt", has_priorities=False)["priority"] == 0


def test_a_label_is_a_version_and_a_digest_or_no_version() -> None:
    assert parse_label(str(Label(12, "b" * 64, "/srv/a b/12"))) == Label(12, "b" * 64, "/srv/a b/12")
    assert parse_label("7") == Label(7)
    assert parse_label(f"7@{'a' * 64}") == Label(7, "a" * 64)
    for text in ("default", "", "step-7", "-1", "7@", "7@xyz", "9" * 40, f"7@{'a' * 64} rel", f"7@{'a' * 64} /\x1b"):
        assert parse_label(text) == Label(0)


def test_a_checkpoint_is_known_by_its_files_and_told_from_what_is_none(tmp_path: Path) -> None:
    one, two = (write_checkpoint(tmp_path / str(number), number) for number in (1, 2))
    again = write_checkpoint(tmp_path / "again", 1)
    assert read_weights(one).digest == read_weights(again).digest != read_weights(two).digest
    check_fits(two, read_weights(two), read_weights(one))
    header = json.dumps({"other": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}).encode()
    (two / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(32))
    with pytest.raises(EngineError, match=r"2 tensors are missing, extra, or of another shape, other"):
        check_fits(two, read_weights(two), read_weights(one))
    path = again / "model.safetensors"
    whole = path.read_bytes()
    no_text, nested = b'{"weight": {"dtype": "\xff"}}', b'{"weight": {"dtype": ' + b"[" * 5000
    for broken in (
        b"",
        whole[:5],
        whole[:-1],
        whole + b"x",
        struct.pack("<Q", 1 << 60) + whole[8:],
        b"\x02" + whole[1:],
        struct.pack("<Q", len(no_text)) + no_text,
        struct.pack("<Q", len(nested)) + nested,
        whole.replace(b'"shape": [8]', b'"shape":[[]]'),
        whole.replace(b"[0, 32]", b'["", 1]'),
        whole.replace(b'"F32"', b"32   "),
        whole.replace(b'"dtype"', b'"dtypo"'),
    ):
        path.write_bytes(broken)
        with pytest.raises(EngineError, match="again"):
            read_weights(again)
    for text in (b"", b"[]", b'{"vocab_size": "\xff"}', b'{"vocab_size": ' + b"[" * 5000 + b"]" * 5000 + b"}"):
        (two / "config.json").write_bytes(text)
        with pytest.raises(EngineError, match=r"no checkpoint: config\.json"):
            read_config(two)
    (one / "config.json").unlink()
    for folder in (one, tmp_path / "nowhere", tmp_path):
        with pytest.raises(EngineError, match="no checkpoint"):
            read_weights(folder)


def test_the_same_tensors_under_another_config_are_other_weights(tmp_path: Path) -> None:
    folders = [write_checkpoint(tmp_path / str(number), 1) for number in range(2)]
    said = {"vocab_size": 8, "rope": {"theta": 1e4, "scale": None}, "dtype": "bfloat16", "eps": 1e-6}

    def compared(**changes: object) -> bool:
        """Whether the second checkpoint is the first one; EngineError if it cannot be loaded in its place."""
        for folder, config in zip(folders, (said, said | changes), strict=True):
            (folder / "config.json").write_text(json.dumps(config))
        old, new = map(read_weights, folders)
        check_fits(folders[1], new, old)
        return old.digest == new.digest

    assert compared()
    assert compared(rope={"scale": None, "theta": 1e4}), "in another order"
    assert not compared(dtype="float32")
    assert not compared(rope={"theta": 1e4, "scale": 2.0, "kind": "yarn"}, head_dim=8), "maybe defaults"
    for changes, named in (({"eps": 1e-5}, "eps"), ({"rope": {"theta": 2e4}}, r"rope\.theta"), ({"rope": 3}, "rope")):
        with pytest.raises(
            EngineError, match=rf"/1: not a checkpoint of this model: .* says otherwise of {named}, and"
        ):
            compared(**changes)


def test_the_text_models_part_of_a_config_counts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 1, "text_config": {"vocab_size": 9}}')
    assert read_config(tmp_path)["vocab_size"] == 9


def test_a_rank_that_a_server_does_not_have_any_more_is_the_servers_fault() -> None:
    body = b'{"error": {"message": "data_parallel_rank 3 is out of range [0, 2).", "code": 400}}'
    assert isinstance(wire.error_of(body, 0), EngineError)
    assert isinstance(wire.error_of(b'{"error": {"message": "too many tokens", "code": 400}}', 0), RequestError)


def test_behind_another_balancer_only_the_ranks_of_the_server_itself_are_counted() -> None:
    spread = {"data_parallel_size": 8, "data_parallel_size_local": 2}
    assert [Parallel(**spread, **each).ranks_count for each in ({}, {"data_parallel_hybrid_lb": True})] == [8, 2]
    assert Parallel(**spread | {"data_parallel_size_local": 0}, data_parallel_external_lb=True).ranks_count == 1
