"""The tokenizer: plain text stays plain, ids read back as text, bad files are named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import tokenizers

from toolcall_dsl import V4, Tokenizer, TokenizerError
from toolcall_dsl.tokenizer import UnitMap

SAMPLES = ["", "a", "  <picture>", "x = 1\r\n\tif y: pass\n\n\n", "热海大滚锅", "☕️ 🧑‍💻 é", "\x00\x1b[0m", "1234567"]


def test_no_spelling_of_a_control_token_becomes_one(tokenizer: Tokenizer, tokenizer_file: Path) -> None:
    for entry in json.loads(tokenizer_file.read_text())["added_tokens"]:
        ids = tokenizer.encode_plain(f"a{entry['content']}b")
        assert tokenizer.control_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == f"a{entry['content']}b"


@pytest.mark.parametrize("text", SAMPLES)
def test_plain_text_has_the_ids_of_the_whole_tokenizer(text: str, tokenizer: Tokenizer, tokenizer_file: Path) -> None:
    whole = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    assert tokenizer.encode_plain(text) == whole.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode_plain(text)) == text


def test_ids_in_any_order_decode_as_the_library_decodes_them(tokenizer: Tokenizer, tokenizer_file: Path) -> None:
    whole = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    known = [i for i in range(4094) if whole.id_to_token(i) is not None]
    for start in range(0, len(known), 61):
        ids = known[start : start + 61]
        assert tokenizer.decode(ids) == whole.decode(ids, skip_special_tokens=False)


def test_half_a_character_decodes_to_the_replacement_sign(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_plain("🧑")
    assert len(ids) > 1
    assert "\ufffd" in tokenizer.decode(ids[:1])
    assert tokenizer.decode(ids) == "🧑"


def test_an_id_outside_the_vocabulary_decodes_to_the_replacement_sign(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([-1, 10**9]) == "\ufffd\ufffd"


def test_a_lone_surrogate_is_encoded_as_the_replacement_sign(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode_plain("a\ud800b")) == "a\ufffdb"


def test_control_tokens_are_found_by_their_spelling(tokenizer: Tokenizer) -> None:
    for spelling in V4.control_tokens:
        assert tokenizer.decode([tokenizer.control(spelling)]) == spelling


def test_a_missing_control_token_is_named_with_its_file(tokenizer: Tokenizer, tokenizer_file: Path) -> None:
    with pytest.raises(TokenizerError) as caught:
        tokenizer.control("<｜System｜>")
    assert "<｜System｜>" in str(caught.value)
    assert str(tokenizer_file) in str(caught.value)


def test_all_control_tokens_that_are_needed_and_missing_are_named(tokenizer: Tokenizer) -> None:
    tokenizer.require(V4.control_tokens)
    with pytest.raises(TokenizerError, match=r"the vocabulary lacks the control tokens <odd>, <｜x｜>$"):
        tokenizer.require([V4.bos, "<odd>", V4.eos, "<｜x｜>"])


def test_every_id_is_below_the_size_of_the_vocabulary(tokenizer: Tokenizer) -> None:
    ids = {*tokenizer.encode_plain("Remove the file a.txt."), *map(tokenizer.control, V4.control_tokens)}
    assert max(ids) < tokenizer.vocab_count <= 1 << 20


def test_the_digest_is_that_of_the_file(tokenizer: Tokenizer, tokenizer_file: Path) -> None:
    assert tokenizer.digest == hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()


def test_a_file_may_be_named_by_a_string(tokenizer: Tokenizer, tokenizer_file: Path) -> None:
    assert Tokenizer.from_file(str(tokenizer_file)).digest == tokenizer.digest


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("# Notes", "not JSON, so no tokenizer.json"),
        ("[" * 100_000, "not JSON, so no tokenizer.json"),
        ('{"model_max_length": 1048576}', "JSON, but no tokenizer.json of a model: that has a list 'added_tokens'"),
        ('{"added_tokens": [], "model": {"vocab": [1]}}', "JSON, but no tokenizer.json of a model"),
        ('{"added_tokens": [{"id": 1}], "model": {"vocab": {}}}', "JSON, but no tokenizer.json of a model"),
    ],
)
def test_a_file_that_is_something_else_is_told_in_words(content: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_file(path)
    assert str(caught.value).startswith(f"{path}: {complaint}")
    assert "KeyError" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"added_tokens": []}',
        b'{"added_tokens": [], "model": {"vocab": {}}}',
        b'{"added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0, "\xe4\xb8\xad": 1}, "unk_token": "a"}}',
    ],
)
def test_a_file_that_is_no_byte_level_tokenizer_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"broken\.json"):
        Tokenizer.from_file(path)


@pytest.mark.parametrize(
    ("added", "complaint"),
    [
        ({"<one>": 300, "<other>": 300}, "tokens '<one>' and '<other>' share the id 300"),
        ({"<one>": 97}, "tokens 'a' and '<one>' share the id 97"),
    ],
)
def test_tokens_that_could_be_taken_for_each_other_are_refused_by_name(
    added: dict[str, int], complaint: str, tmp_path: Path
) -> None:
    vocabulary = {chr(i): i for i in range(33, 127)}
    entries = [{"content": token, "id": i} for token, i in added.items()]
    path = tmp_path / "tokenizer.json"
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    path.write_text(json.dumps({"added_tokens": entries, "model": model}))
    with pytest.raises(TokenizerError, match=f"^{path}: {complaint}$"):
        Tokenizer.from_file(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"absent\.json"):
        Tokenizer.from_file(tmp_path / "absent.json")


def test_more_control_tokens_than_there_are_units_are_refused() -> None:
    with pytest.raises(TokenizerError, match="control tokens, more than"):
        UnitMap(f"<{i}>" for i in range(6400))


def test_a_vocabulary_that_would_make_plain_text_a_control_token_is_caught(
    tokenizer_file: Path, tmp_path: Path
) -> None:
    definition = json.loads(tokenizer_file.read_text())
    definition["added_tokens"].append({**definition["added_tokens"][0], "id": 3, "content": "!"})
    path = tmp_path / "overlapping.json"
    path.write_text(json.dumps(definition))
    with pytest.raises(TokenizerError, match=r"overlapping\.json: plain text"):
        Tokenizer.from_file(path).encode_plain("Stop!")
