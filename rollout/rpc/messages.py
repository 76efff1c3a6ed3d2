"""Structs to protobuf messages and back, by field name; shared by the server and the client.

A message of the protocol that carries one of our structs has its field names, so one pair of functions does
for all of them: `fill` and `plain`.  An enum value `THINKING_HIGH` of `Thinking` is "high" in a struct, unset is
None.  What a peer sends is checked here as far as it is the same for every message: text, enum values, size.

Invariants:
1. `merge(parts(message)) == message`, and every part is smaller than `MESSAGE_BYTES_MAX`.

See: proto/rollout/pb/v1/rollout.proto.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from rollout.errors import RequestError

MESSAGE_BYTES_MAX = 4 << 20
PART_BYTES_MAX = 3 << 20
"""Of repeated fields in one part; what is not repeated comes with the first."""
SCALAR_BYTES_MAX = 10
_Field = descriptor_pb2.FieldDescriptorProto
Descriptor = Any
"""Of a field or an enum; there are two classes of each, of which the stubs know one."""


def fill(message: Message, value: object) -> None:
    """Set the fields of `message` that `value`, a struct or a mapping, has and that are not None."""
    for field in message.DESCRIPTOR.fields:
        given = value.get(field.name) if isinstance(value, Mapping) else getattr(value, field.name, None)
        if given is None:
            continue
        target = getattr(message, field.name)
        if isinstance(given, Mapping) and field.is_repeated:
            target.update(given)
        elif field.is_repeated and field.message_type:
            for each in given:
                fill(target.add(), each)
        elif field.is_repeated:
            target.extend(_number(field.enum_type, each) if field.enum_type else each for each in given)
        elif field.message_type:
            target.SetInParent()
            fill(target, given)
        else:
            setattr(message, field.name, _number(field.enum_type, given) if field.enum_type else given)


def plain(message: Message, *, keeps_unset: bool = False) -> dict[str, Any]:
    """The fields of a message as builtins; those that say whether they are set and are not: None, or left out."""
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            values[field.name] = _plain_list(field, value, keeps_unset=keeps_unset)
        elif field.enum_type:
            if value:
                values[field.name] = _name(field.enum_type, value)
        elif field.has_presence and not message.HasField(field.name):
            if keeps_unset:
                values[field.name] = None
        else:
            values[field.name] = plain(value, keeps_unset=keeps_unset) if field.message_type else value
    return values


def _plain_list(field: Descriptor, value: Any, *, keeps_unset: bool) -> Any:
    if is_map(field):
        return dict(value)
    if field.message_type:
        return [plain(each, keeps_unset=keeps_unset) for each in value]
    return [_name(field.enum_type, each) for each in value if each] if field.enum_type else list(value)


def is_map(field: Descriptor) -> bool:
    """Whether a field is a map, which protobuf keeps as a repeated entry."""
    return bool(field.message_type and field.message_type.GetOptions().map_entry)


def _prefix(enum: Descriptor) -> str:
    return str(enum.values[0].name).removesuffix("UNSPECIFIED")


def _name(enum: Descriptor, number: int) -> str:
    return str(enum.values_by_number[number].name).removeprefix(_prefix(enum)).lower()


def _number(enum: Descriptor, name: str) -> int:
    value = enum.values_by_name.get(_prefix(enum) + name.upper())
    if value is None:
        names = [_name(enum, number) for number in enum.values_by_number if number]
        raise RequestError(f"{enum.name}: {name!r} is none of {', '.join(names)}")
    return int(value.number)


def parts(message: Message, bytes_max: int = PART_BYTES_MAX) -> Iterator[Any]:
    """The message, or messages whose merge it is.

    RequestError if what cannot be split (a text) is too large for one.
    """
    if message.ByteSize() <= bytes_max:
        yield message
        return
    head = type(message)()
    head.CopyFrom(message)
    lists = [field for field in message.DESCRIPTOR.fields if field.is_repeated and not is_map(field)]
    for field in lists:
        head.ClearField(field.name)
    yield _bounded(head)
    for field in lists:
        for chunk in _chunks(field, getattr(message, field.name), bytes_max):
            part = type(message)()
            getattr(part, field.name).extend(chunk)
            yield _bounded(part)


def _chunks(field: Descriptor, values: Any, bytes_max: int) -> Iterator[Any]:
    if not field.message_type and field.cpp_type != FieldDescriptor.CPPTYPE_STRING:
        count = bytes_max // SCALAR_BYTES_MAX
        yield from (values[start : start + count] for start in range(0, len(values), count))
        return
    chunk: list[Any] = []
    size = 0
    for value in values:
        each = value.ByteSize() if field.message_type else len(value if isinstance(value, bytes) else value.encode())
        if chunk and size + each + SCALAR_BYTES_MAX > bytes_max:
            yield chunk
            chunk, size = [], 0
        chunk.append(value)
        size += each + SCALAR_BYTES_MAX
    if chunk:
        yield chunk


def _bounded(message: Message) -> Message:
    if (size := message.ByteSize()) >= MESSAGE_BYTES_MAX:
        raise RequestError(f"{size} bytes of text do not fit one message: ask without FIELD_TEXT")
    return message


def merge(messages: Iterable[Any]) -> Any:
    """What several messages say together; None if there is none."""
    whole = None
    for message in messages:
        if whole is None:
            whole = message
        else:
            whole.MergeFrom(message)
    return whole


def parse(kind: type[Message], data: bytes) -> Message:
    """A request from its bytes.  RequestError names the field whose text or enum value cannot be."""
    try:
        message = kind.FromString(data)
    except DecodeError as error:
        where = _bad_text(kind, data)
        why = f"{where}: not UTF-8" if where else f"not a {kind.DESCRIPTOR.name} message"
        raise RequestError(why) from error
    if wrong := next(_bad_enums(message), None):
        raise RequestError(wrong)
    return message


def _bad_enums(message: Message, prefix: str = "") -> Iterator[str]:
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        if field.enum_type:
            for number in values:
                if number not in field.enum_type.values_by_number:
                    yield f"{prefix}{field.name}: {number} is not known to this server"
        elif field.message_type and not is_map(field):
            for each in values:
                yield from _bad_enums(each, f"{prefix}{field.name}.")


def _bad_text(kind: type[Message], data: bytes) -> str:
    """The path of the first field whose text is not UTF-8; "" if the bytes are no message at all."""
    pool = _lenient(kind.DESCRIPTOR.file)
    try:
        message = GetMessageClass(pool.FindMessageTypeByName(kind.DESCRIPTOR.full_name)).FromString(data)
    except DecodeError:
        return ""
    return next(_bad_bytes(message, kind.DESCRIPTOR, ""), "")


@functools.cache
def _lenient(file: Any) -> DescriptorPool:
    """The protocol with bytes for all text, so that it can be looked at."""
    proto = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(proto)
    waiting = list(proto.message_type)
    while waiting:
        message = waiting.pop()
        waiting += message.nested_type
        message.options.ClearField("map_entry")
        for field in message.field:
            if field.type == _Field.TYPE_STRING:
                field.type = _Field.TYPE_BYTES
    pool = DescriptorPool()
    pool.Add(proto)
    return pool


def _bad_bytes(message: Message, real: Any, prefix: str) -> Iterator[str]:
    for field, value in message.ListFields():
        known = real.fields_by_name[field.name]
        for each in value if field.is_repeated else [value]:
            if field.message_type:
                yield from _bad_bytes(each, known.message_type, f"{prefix}{field.name}.")
            elif known.type == FieldDescriptor.TYPE_STRING and not _is_text(each):
                yield f"{prefix}{field.name}"


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
