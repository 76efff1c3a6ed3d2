"""The subschemas of a JSON Schema, and how often a value makes a validator visit them.

A validator takes every way through `anyOf` and its like, and each way may be shared by references:
twenty small definitions can ask for a million visits of one value.  So the ways are counted before
any validator runs: all of them when a schema is read, and those that a value takes where that may
be many.  The count trusts no validator's cache, and never runs longer than its bound.

Invariants:
1. A reference is followed only where one single place of the document can be meant, whatever the
   rules of its draft are; every other reference is refused.  So the count is never too small.
2. A schema that leads back to itself without going into the value is refused: it says nothing.

See: docs/formats/toolcall_dsl.md, "Schema check".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from toolcall_dsl.errors import SchemaError

ENTRIES_MAX = 100_000
"""Most entries of lists and objects in a schema."""
WAYS_MAX = 10_000
"""Most subschemas on all ways through a schema; a reference back to where the way came from is the end of it."""
WORK_MAX = 500_000
"""Most steps of one check, a step for each entry of each subschema that is visited; also most entries of a value."""

_IN_PLACE = frozenset({"allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "dependencies"})
_ITEMS = frozenset({"items", "prefixItems", "additionalItems", "contains", "unevaluatedItems"})
_MEMBERS = frozenset(
    {"properties", "patternProperties", "additionalProperties", "unevaluatedProperties", "propertyNames"}
)
_APPLICATORS = _IN_PLACE | _ITEMS | _MEMBERS
_BY_NAME = frozenset({"dependentSchemas", "dependencies", "properties", "patternProperties"})
_ANCHORS = frozenset({"$anchor", "$dynamicAnchor"})
_REFERENCES = frozenset({"$ref", "$dynamicRef", "$recursiveRef"})
_NO_TAILS = frozenset({"", ".", ".."})
_REPORT_ENTRIES = 32
"""What a misfit costs beside the copy of its value, in entries (as measured: 7 us, and 0.2 us an entry)."""
_Schema = Mapping[str, object]


@dataclass(frozen=True)
class _Edge:
    """A subschema below another: under which keyword, and which of several there."""

    keyword: str
    name: str | int | None
    schema: _Schema


class Subschemas:
    """A schema's document, its references resolved.  Read only, so threads may share it."""

    def __init__(self, root: _Schema) -> None:
        """SchemaError for a document or ways through it above the bounds, or a reference that cannot be followed."""
        self._root = root
        self._anchors: defaultdict[str, list[object]] = defaultdict(list)
        self._edges: dict[int, tuple[_Edge, ...]] = {}
        self._recurs = False
        self._steps_per_value = 0
        self.has_alternatives = False
        """Whether a misfit may hold others: those of the alternatives that were tried."""
        self._index()
        self._count_ways()

    def admits(self, value: object) -> bool:
        """Whether checking `value` takes at most `WORK_MAX` steps."""
        size = _entries(value)
        if size > WORK_MAX:
            return False
        is_little = not self._recurs and self._steps_per_value * (size + 1) <= WORK_MAX
        return is_little or self._effort(value)[0] <= WORK_MAX

    def reports(self, value: object) -> bool:
        """Whether telling all misfits of an admitted `value` copies at most `WORK_MAX` entries of values."""
        return self._effort(value)[1] <= WORK_MAX

    def _effort(self, value: object) -> tuple[int, int]:
        """The steps of all visits, and the entries that reports copy if each step fails; steps end above `WORK_MAX`."""
        sizes = _sizes(value)
        steps = copied = 0
        open_visits: list[tuple[_Schema, object]] = [(self._root, value)]
        while open_visits and steps <= WORK_MAX:
            schema, each = open_visits.pop()
            weight = _weight(schema)
            steps += weight
            copied += weight * (_REPORT_ENTRIES + sizes.get(id(each), 0))
            for edge in self._below(schema):
                inner = _reached(schema, edge, each)
                steps += len(inner)
                open_visits += [(edge.schema, one) for one in inner]
        return steps, copied

    def _index(self) -> None:
        """Find what references can name: resources by their id, subschemas by their anchor."""
        count = 0
        containers: list[object] = [self._root]
        objects: list[_Schema] = []
        while containers:
            node = containers.pop()
            inner = _inside(node)
            count += len(inner)
            if count > ENTRIES_MAX:
                raise SchemaError(f"more than {ENTRIES_MAX} entries")
            containers += [each for each in inner if isinstance(each, Mapping | list)]
            objects += [node] if isinstance(node, Mapping) else []
        ids = ("$id", "id") if any("draft-04" in str(each.get("$schema")) for each in objects) else ("$id",)
        self._homes = [("", self._root)]
        for each in objects:
            for name in (name for key in ids if isinstance(name := each.get(key), str)):
                resource, _, anchor = name.partition("#")
                self._homes += [(resource, each)] if resource else []
                self._anchors[anchor].append(each)
            for key in _ANCHORS & each.keys():
                self._anchors[str(each[key])].append(each)

    def _count_ways(self) -> None:
        ways, depth = 0, 0
        path: dict[int, int] = {}
        open_nodes: list[tuple[_Schema, int, bool]] = [(self._root, 0, True)]
        while open_nodes:
            schema, depth, is_entered = open_nodes.pop()
            if not is_entered:
                del path[id(schema)]
                continue
            if id(schema) in path:
                if path[id(schema)] == depth:
                    raise SchemaError("a schema that refers to itself without going into the value")
                self._recurs = True
                continue
            ways += 1
            if ways > WAYS_MAX:
                raise SchemaError(f"more than {WAYS_MAX} ways through its subschemas")
            path[id(schema)] = depth
            open_nodes.append((schema, depth, False))
            self._steps_per_value += _weight(schema) + len(self._below(schema))
            for edge in self._below(schema):
                self.has_alternatives |= edge.keyword in {"anyOf", "oneOf"}
                is_inside = edge.keyword in _ITEMS or edge.keyword in _MEMBERS
                open_nodes.append((edge.schema, depth + is_inside, True))

    def _below(self, schema: _Schema) -> tuple[_Edge, ...]:
        known = self._edges.get(id(schema))
        if known is None:
            known = self._edges[id(schema)] = tuple(self._edges_of(schema))
        return known

    def _edges_of(self, schema: _Schema) -> Iterator[_Edge]:
        for keyword, inner in schema.items():
            several: list[tuple[str | int | None, object]] = []
            if keyword in _REFERENCES and isinstance(inner, str):
                several = [(None, self._referred(inner))]
            elif keyword in _BY_NAME and isinstance(inner, Mapping):
                several = list(inner.items())
            elif keyword in _APPLICATORS:
                several = list(enumerate(inner)) if isinstance(inner, list) else [(None, inner)]
            yield from (_Edge(keyword, name, each) for name, each in several if isinstance(each, Mapping))

    def _referred(self, reference: str) -> object:
        resource, _, fragment = reference.partition("#")
        fragment = unquote(fragment)
        tail = _tail(resource)
        homes = [home for name, home in self._homes if not resource or (tail not in _NO_TAILS and _tail(name) == tail)]
        targets: list[object] = []
        if not fragment:
            targets += homes
        elif fragment.startswith("/"):
            targets += [target for home in homes for target in _pointed(home, fragment)]
        else:
            targets += self._anchors.get(fragment, ())
        if len({id(target) for target in targets}) != 1:
            where = "more than one place" if targets else "no place"
            raise SchemaError(f"the reference {reference!r} leads to {where} in the schema")
        return targets[0]


def _inside(node: object) -> Sequence[object]:
    """The entries of a list or an object; a value without any has none."""
    if isinstance(node, Mapping):
        return list(node.values())
    return node if isinstance(node, list) else ()


def _entries(value: object) -> int:
    """The entries of all lists and objects in a value; not all, but more than `WORK_MAX`, where there are more."""
    count = 0
    open_values = [value]
    while open_values and count <= WORK_MAX:
        inner = _inside(open_values.pop())
        count += len(inner)
        open_values += [each for each in inner if isinstance(each, dict | list)]
    return count


def _sizes(value: object) -> dict[int, int]:
    """The entries in each list and object of a value, by its identity."""
    order = [value]
    for node in order:
        order += [each for each in _inside(node) if isinstance(each, dict | list)]
    sizes: dict[int, int] = {}
    for node in reversed(order):
        inner = _inside(node)
        sizes[id(node)] = len(inner) + sum(sizes.get(id(each), 0) for each in inner)
    return sizes


def _weight(schema: _Schema) -> int:
    """Steps of one visit: long lists of options or required names cost what they hold."""
    return 1 + sum(len(inner) for inner in schema.values() if isinstance(inner, list | Mapping))


def _reached(schema: _Schema, edge: _Edge, value: object) -> list[object]:
    """The values that a subschema is applied to when `schema` is applied to `value`; never too few."""
    if edge.keyword in _ITEMS and isinstance(value, list):
        return value[edge.name : edge.name + 1] if isinstance(edge.name, int) else value
    if edge.keyword in _MEMBERS and isinstance(value, dict):
        if edge.keyword == "properties":
            return [value[edge.name]] if edge.name in value else []
        if edge.keyword == "propertyNames":
            return list(value)
        declared = schema.get("properties") if edge.keyword == "additionalProperties" else None
        declared = declared if isinstance(declared, Mapping) else {}
        return [each for name, each in value.items() if name not in declared]
    return [] if edge.keyword in _ITEMS or edge.keyword in _MEMBERS else [value]


def _tail(name: str) -> str:
    return name.rpartition("/")[2]


def _pointed(home: object, pointer: str) -> list[object]:
    """What a JSON pointer leads to from `home`: one thing or none."""
    node = home
    for step in pointer.split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, Mapping) and key in node:
            node = node[key]
        else:
            return []
    return [node]
