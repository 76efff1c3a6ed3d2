"""Token ids to and from text, with control tokens kept apart from text.

Two things differ from using `tokenizers` directly.  Plain text is encoded by a tokenizer that
was built without added tokens, so no spelling in hostile text becomes a control id.  And sampled
ids are read as *units* instead of text: one character below U+0100 for each byte of an ordinary
token, one private-use character for each control token.  A grammar over units sees by
construction which control tokens were really sampled, a unit index is a byte-exact position, and
a character cut in half by a token border is whole again once units are joined.

Invariants:
1. `encode_plain` never returns the id of an added token.
2. `decode(encode_plain(t)) == t` for every text that is valid Unicode.
3. `units` gives at least one unit for every token id, known or not.

See: docs/formats/toolcall_dsl.md, "Text that cannot become a token".
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as _BpeTokenizer

from toolcall_dsl.errors import TokenizerError

_FIRST_CONTROL_UNIT = 0xE000
_ABSENT_UNIT = chr(0xF8FF)
_CONTROL_COUNT_MAX = 0xF8FF - _FIRST_CONTROL_UNIT
_UNKNOWN = "�".encode().decode("latin-1")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class UnitMap:
    """Which private-use character stands for which control token spelling."""

    def __init__(self, spellings: Iterable[str]) -> None:
        """Number the spellings in order; TokenizerError when there are more than 6,399."""
        self._unit_of = {spelling: chr(_FIRST_CONTROL_UNIT + i) for i, spelling in enumerate(spellings)}
        if len(self._unit_of) > _CONTROL_COUNT_MAX:
            raise TokenizerError(f"{len(self._unit_of)} control tokens, more than {_CONTROL_COUNT_MAX}")
        self._spelling_of = {unit: spelling for spelling, unit in self._unit_of.items()}
        longest_first = sorted(self._unit_of, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None

    def find(self, spelling: str) -> str:
        """The unit of a control token, or one that no input contains if the vocabulary lacks it."""
        return self._unit_of.get(spelling, _ABSENT_UNIT)

    def split(self, text: str) -> list[str]:
        """Text cut so that each control token spelled in it is a part of its own."""
        return self._split.split(text) if self._split is not None else [text]

    def units(self, text: str) -> str:
        """Units of trusted text: a control token spelled in it is that control token."""
        return "".join(self._unit_of.get(part) or plain_units(part) for part in self.split(text))

    def text(self, units: str) -> str:
        """Text of units; bytes that are not UTF-8 become U+FFFD."""
        data = bytearray()
        for run in re.split("([\ue000-\uf8ff])", units):
            data += self._spelling_of[run].encode() if run in self._spelling_of else run.encode("latin-1")
        return data.decode("utf-8", errors="replace")


def valid_text(text: str) -> str:
    """Text that has a UTF-8 form: lone surrogates become U+FFFD."""
    return _LONE_SURROGATE.sub("�", text)


def plain_units(text: str) -> str:
    """Units of text in which nothing is a control token; lone surrogates become U+FFFD."""
    return valid_text(text).encode().decode("latin-1")


class _Units(dict[int, str]):
    def __missing__(self, _: int) -> str:
        return _UNKNOWN


class Tokenizer:
    """A byte-level BPE tokenizer of the DeepSeek family."""

    def __init__(self, definition: str, source: str) -> None:
        """Build from the text of a tokenizers JSON; `source` names it in errors.  TokenizerError."""
        parts, added, vocabulary = _definition(definition, source)
        try:
            self._plain = _BpeTokenizer.from_str(json.dumps({**parts, "added_tokens": []}))
        except Exception as error:  # the tokenizers library raises no narrower class
            raise TokenizerError(f"{source}: not a usable tokenizers JSON: {error}") from error
        self._source = source
        merged_ids(vocabulary, added, source)
        self._control_ids = added
        self._control_id_set = frozenset(added.values())
        self.digest = hashlib.sha256(definition.encode()).hexdigest()
        self.unit_map = UnitMap(added)
        units = _Units((i, _byte_level_units(token, source)) for token, i in vocabulary.items() if token not in added)
        units.update({i: self.unit_map.find(token) for token, i in added.items()})
        self.units: Callable[[int], str] = units.__getitem__
        """Units of one token; an id outside the vocabulary reads as U+FFFD.  It is asked for every token there is."""
        self.token_bytes_max = max(map(len, units.values()), default=1)
        """Of plain text that one token can stand for."""
        self.vocab_count = max(units, default=-1) + 1
        """Every id is below it."""

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a model's `tokenizer.json`; `digest` is the sha256 of its bytes.  TokenizerError names the file."""
        try:
            definition = Path(path).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path}: cannot be read: {error}") from error
        return cls(definition, str(path))

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of all added tokens."""
        return self._control_id_set

    def encode_plain(self, text: str) -> list[int]:
        """Ids of text in which nothing is a control token; lone surrogates become U+FFFD."""
        ids = self._plain.encode(valid_text(text), add_special_tokens=False).ids
        if not self._control_id_set.isdisjoint(ids):
            raise TokenizerError(f"{self._source}: plain text was encoded to a control token")
        return ids

    def control(self, token: str) -> int:
        """Id of a control token by its spelling; TokenizerError if the vocabulary lacks it."""
        try:
            return self._control_ids[token]
        except KeyError:
            raise TokenizerError(f"{self._source}: the vocabulary has no control token {token!r}") from None

    def require(self, tokens: Iterable[str]) -> None:
        """TokenizerError, which names them all, for control tokens that the vocabulary lacks."""
        if missing := [token for token in tokens if token not in self._control_ids]:
            raise TokenizerError(f"{self._source}: the vocabulary lacks the control tokens {', '.join(missing)}")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens spelled out, bytes that are not UTF-8 as U+FFFD."""
        return self.unit_map.text("".join(map(self.units, ids)))


def merged_ids(vocabulary: Mapping[str, int], added: Mapping[str, int], source: str) -> dict[str, int]:
    """Every token's id.  TokenizerError, which names them, for two tokens that share one."""
    ids = {**vocabulary, **added}
    spellings: dict[int, str] = {}
    for token, token_id in ids.items():
        if (other := spellings.setdefault(token_id, token)) != token:
            raise TokenizerError(f"{source}: tokens {other!r:.80} and {token!r:.80} share the id {token_id!r:.40}")
    return ids


def _definition(text: str, source: str) -> tuple[dict[str, Any], dict[str, int], dict[str, int]]:
    """A tokenizers JSON, its added tokens and its vocabulary."""
    try:
        parts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{source}: not JSON, so no tokenizer.json: {error}") from error
    try:
        added = {entry["content"]: int(entry["id"]) for entry in parts["added_tokens"]}
        return parts, added, dict(parts["model"]["vocab"])
    except (ValueError, KeyError, TypeError) as error:
        raise TokenizerError(
            f"{source}: JSON, but no tokenizer.json of a model: that has a list 'added_tokens' and an object 'model'"
            " with its 'vocab' (tokenizer_config.json is another file)"
        ) from error


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE: itself if printable, else U+0100 upwards in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


_BYTE_OF = _byte_alphabet()
_TO_UNITS = {ord(stand_in): byte for stand_in, byte in _BYTE_OF.items()}


def _byte_level_units(token: str, source: str) -> str:
    units = token.translate(_TO_UNITS)
    if not token or any(unit > "\xff" for unit in units):
        raise TokenizerError(f"{source}: vocabulary entry {token!r} is not byte-level BPE")
    return units
