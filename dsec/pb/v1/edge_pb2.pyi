from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Stream(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STREAM_UNSPECIFIED: _ClassVar[Stream]
    STDOUT: _ClassVar[Stream]
    STDERR: _ClassVar[Stream]
STREAM_UNSPECIFIED: Stream
STDOUT: Stream
STDERR: Stream

class Done(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NetworkRule(_message.Message):
    __slots__ = ("host", "cidr", "ports")
    HOST_FIELD_NUMBER: _ClassVar[int]
    CIDR_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    host: str
    cidr: str
    ports: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, host: _Optional[str] = ..., cidr: _Optional[str] = ..., ports: _Optional[_Iterable[int]] = ...) -> None: ...

class NetworkPolicy(_message.Message):
    __slots__ = ("rules",)
    RULES_FIELD_NUMBER: _ClassVar[int]
    rules: _containers.RepeatedCompositeFieldContainer[NetworkRule]
    def __init__(self, rules: _Optional[_Iterable[_Union[NetworkRule, _Mapping]]] = ...) -> None: ...

class Defaults(_message.Message):
    __slots__ = ("env", "cwd", "user")
    class EnvEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    ENV_FIELD_NUMBER: _ClassVar[int]
    CWD_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    env: _containers.ScalarMap[str, bytes]
    cwd: bytes
    user: str
    def __init__(self, env: _Optional[_Mapping[str, bytes]] = ..., cwd: _Optional[bytes] = ..., user: _Optional[str] = ...) -> None: ...

class SandboxSpec(_message.Message):
    __slots__ = ("base", "layers", "network", "cpu_weight", "memory_bytes", "disk_bytes", "pids_count_max", "cpu_cores", "hostname", "defaults")
    BASE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    CPU_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PIDS_COUNT_MAX_FIELD_NUMBER: _ClassVar[int]
    CPU_CORES_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    base: str
    layers: _containers.RepeatedScalarFieldContainer[str]
    network: NetworkPolicy
    cpu_weight: int
    memory_bytes: int
    disk_bytes: int
    pids_count_max: int
    cpu_cores: float
    hostname: str
    defaults: Defaults
    def __init__(self, base: _Optional[str] = ..., layers: _Optional[_Iterable[str]] = ..., network: _Optional[_Union[NetworkPolicy, _Mapping]] = ..., cpu_weight: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., pids_count_max: _Optional[int] = ..., cpu_cores: _Optional[float] = ..., hostname: _Optional[str] = ..., defaults: _Optional[_Union[Defaults, _Mapping]] = ...) -> None: ...

class CreateRequest(_message.Message):
    __slots__ = ("spec", "request_id", "labels", "owner", "epoch", "idle_timeout_s", "lifetime_s")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SPEC_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_S_FIELD_NUMBER: _ClassVar[int]
    spec: SandboxSpec
    request_id: str
    labels: _containers.ScalarMap[str, str]
    owner: str
    epoch: int
    idle_timeout_s: float
    lifetime_s: float
    def __init__(self, spec: _Optional[_Union[SandboxSpec, _Mapping]] = ..., request_id: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., owner: _Optional[str] = ..., epoch: _Optional[int] = ..., idle_timeout_s: _Optional[float] = ..., lifetime_s: _Optional[float] = ...) -> None: ...

class Sandbox(_message.Message):
    __slots__ = ("id", "state", "spec", "labels", "owner", "epoch", "created_at_s", "expires_at_s", "commands_count", "reason")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_S_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_S_FIELD_NUMBER: _ClassVar[int]
    COMMANDS_COUNT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    id: str
    state: str
    spec: SandboxSpec
    labels: _containers.ScalarMap[str, str]
    owner: str
    epoch: int
    created_at_s: float
    expires_at_s: float
    commands_count: int
    reason: str
    def __init__(self, id: _Optional[str] = ..., state: _Optional[str] = ..., spec: _Optional[_Union[SandboxSpec, _Mapping]] = ..., labels: _Optional[_Mapping[str, str]] = ..., owner: _Optional[str] = ..., epoch: _Optional[int] = ..., created_at_s: _Optional[float] = ..., expires_at_s: _Optional[float] = ..., commands_count: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Sandboxes(_message.Message):
    __slots__ = ("sandboxes",)
    SANDBOXES_FIELD_NUMBER: _ClassVar[int]
    sandboxes: _containers.RepeatedCompositeFieldContainer[Sandbox]
    def __init__(self, sandboxes: _Optional[_Iterable[_Union[Sandbox, _Mapping]]] = ...) -> None: ...

class SandboxRef(_message.Message):
    __slots__ = ("sandbox_id",)
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    def __init__(self, sandbox_id: _Optional[str] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("labels",)
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    LABELS_FIELD_NUMBER: _ClassVar[int]
    labels: _containers.ScalarMap[str, str]
    def __init__(self, labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ("sandbox_id", "name")
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    name: str
    def __init__(self, sandbox_id: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class Layer(_message.Message):
    __slots__ = ("layer_id",)
    LAYER_ID_FIELD_NUMBER: _ClassVar[int]
    layer_id: str
    def __init__(self, layer_id: _Optional[str] = ...) -> None: ...

class ForkRequest(_message.Message):
    __slots__ = ("sandbox_id", "count", "create")
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    CREATE_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    count: int
    create: CreateRequest
    def __init__(self, sandbox_id: _Optional[str] = ..., count: _Optional[int] = ..., create: _Optional[_Union[CreateRequest, _Mapping]] = ...) -> None: ...

class BranchRequest(_message.Message):
    __slots__ = ("sandbox_id", "key", "create")
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    CREATE_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    key: str
    create: CreateRequest
    def __init__(self, sandbox_id: _Optional[str] = ..., key: _Optional[str] = ..., create: _Optional[_Union[CreateRequest, _Mapping]] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class UpdateNetworkRequest(_message.Message):
    __slots__ = ("sandbox_id", "policy")
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    policy: NetworkPolicy
    def __init__(self, sandbox_id: _Optional[str] = ..., policy: _Optional[_Union[NetworkPolicy, _Mapping]] = ...) -> None: ...

class TtySize(_message.Message):
    __slots__ = ("rows", "columns")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    columns: int
    def __init__(self, rows: _Optional[int] = ..., columns: _Optional[int] = ...) -> None: ...

class Command(_message.Message):
    __slots__ = ("argv", "cwd", "env", "stdin", "timeout_s", "output_bytes_max", "merge_stderr", "kill_others", "user", "keep_stdin_open", "tty")
    class EnvEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    ARGV_FIELD_NUMBER: _ClassVar[int]
    CWD_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    STDIN_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    MERGE_STDERR_FIELD_NUMBER: _ClassVar[int]
    KILL_OTHERS_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    KEEP_STDIN_OPEN_FIELD_NUMBER: _ClassVar[int]
    TTY_FIELD_NUMBER: _ClassVar[int]
    argv: _containers.RepeatedScalarFieldContainer[bytes]
    cwd: bytes
    env: _containers.ScalarMap[str, bytes]
    stdin: bytes
    timeout_s: float
    output_bytes_max: int
    merge_stderr: bool
    kill_others: bool
    user: str
    keep_stdin_open: bool
    tty: TtySize
    def __init__(self, argv: _Optional[_Iterable[bytes]] = ..., cwd: _Optional[bytes] = ..., env: _Optional[_Mapping[str, bytes]] = ..., stdin: _Optional[bytes] = ..., timeout_s: _Optional[float] = ..., output_bytes_max: _Optional[int] = ..., merge_stderr: _Optional[bool] = ..., kill_others: _Optional[bool] = ..., user: _Optional[str] = ..., keep_stdin_open: _Optional[bool] = ..., tty: _Optional[_Union[TtySize, _Mapping]] = ...) -> None: ...

class ExecRequest(_message.Message):
    __slots__ = ("sandbox_id", "key", "command")
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    key: str
    command: Command
    def __init__(self, sandbox_id: _Optional[str] = ..., key: _Optional[str] = ..., command: _Optional[_Union[Command, _Mapping]] = ...) -> None: ...

class CommandRef(_message.Message):
    __slots__ = ("sandbox_id", "key")
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    key: str
    def __init__(self, sandbox_id: _Optional[str] = ..., key: _Optional[str] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("head", "tail", "dropped_bytes")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    DROPPED_BYTES_FIELD_NUMBER: _ClassVar[int]
    head: bytes
    tail: bytes
    dropped_bytes: int
    def __init__(self, head: _Optional[bytes] = ..., tail: _Optional[bytes] = ..., dropped_bytes: _Optional[int] = ...) -> None: ...

class ExecResult(_message.Message):
    __slots__ = ("exit_code", "stdout", "stderr", "timed_out", "oom_killed", "duration_s")
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    STDOUT_FIELD_NUMBER: _ClassVar[int]
    STDERR_FIELD_NUMBER: _ClassVar[int]
    TIMED_OUT_FIELD_NUMBER: _ClassVar[int]
    OOM_KILLED_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    exit_code: int
    stdout: Output
    stderr: Output
    timed_out: bool
    oom_killed: bool
    duration_s: float
    def __init__(self, exit_code: _Optional[int] = ..., stdout: _Optional[_Union[Output, _Mapping]] = ..., stderr: _Optional[_Union[Output, _Mapping]] = ..., timed_out: _Optional[bool] = ..., oom_killed: _Optional[bool] = ..., duration_s: _Optional[float] = ...) -> None: ...

class CommandInfo(_message.Message):
    __slots__ = ("key", "number", "command", "state", "result")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    key: str
    number: int
    command: Command
    state: str
    result: ExecResult
    def __init__(self, key: _Optional[str] = ..., number: _Optional[int] = ..., command: _Optional[_Union[Command, _Mapping]] = ..., state: _Optional[str] = ..., result: _Optional[_Union[ExecResult, _Mapping]] = ...) -> None: ...

class ReadOutputRequest(_message.Message):
    __slots__ = ("sandbox_id", "key", "stream", "offset", "bytes_max")
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    key: str
    stream: Stream
    offset: int
    bytes_max: int
    def __init__(self, sandbox_id: _Optional[str] = ..., key: _Optional[str] = ..., stream: _Optional[_Union[Stream, str]] = ..., offset: _Optional[int] = ..., bytes_max: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("stream", "offset", "data")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    stream: Stream
    offset: int
    data: bytes
    def __init__(self, stream: _Optional[_Union[Stream, str]] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("sandbox_id", "key", "stdout_offset", "stderr_offset")
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    STDOUT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    STDERR_OFFSET_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    key: str
    stdout_offset: int
    stderr_offset: int
    def __init__(self, sandbox_id: _Optional[str] = ..., key: _Optional[str] = ..., stdout_offset: _Optional[int] = ..., stderr_offset: _Optional[int] = ...) -> None: ...

class AttachEvent(_message.Message):
    __slots__ = ("chunk", "result")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    chunk: Chunk
    result: ExecResult
    def __init__(self, chunk: _Optional[_Union[Chunk, _Mapping]] = ..., result: _Optional[_Union[ExecResult, _Mapping]] = ...) -> None: ...

class WriteStdinRequest(_message.Message):
    __slots__ = ("sandbox_id", "key", "data")
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    key: str
    data: bytes
    def __init__(self, sandbox_id: _Optional[str] = ..., key: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class SignalRequest(_message.Message):
    __slots__ = ("sandbox_id", "key", "number")
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    key: str
    number: int
    def __init__(self, sandbox_id: _Optional[str] = ..., key: _Optional[str] = ..., number: _Optional[int] = ...) -> None: ...

class ResizeRequest(_message.Message):
    __slots__ = ("sandbox_id", "key", "size")
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    key: str
    size: TtySize
    def __init__(self, sandbox_id: _Optional[str] = ..., key: _Optional[str] = ..., size: _Optional[_Union[TtySize, _Mapping]] = ...) -> None: ...

class GrantLeaseRequest(_message.Message):
    __slots__ = ("owner", "epoch", "ttl_s")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    owner: str
    epoch: int
    ttl_s: float
    def __init__(self, owner: _Optional[str] = ..., epoch: _Optional[int] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class EndLeaseRequest(_message.Message):
    __slots__ = ("owner", "epoch")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    owner: str
    epoch: int
    def __init__(self, owner: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class GetHostRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Host(_message.Message):
    __slots__ = ("used", "total", "sandboxes")
    class UsedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class TotalEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class SandboxesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    USED_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    SANDBOXES_FIELD_NUMBER: _ClassVar[int]
    used: _containers.ScalarMap[str, float]
    total: _containers.ScalarMap[str, float]
    sandboxes: _containers.ScalarMap[str, int]
    def __init__(self, used: _Optional[_Mapping[str, float]] = ..., total: _Optional[_Mapping[str, float]] = ..., sandboxes: _Optional[_Mapping[str, int]] = ...) -> None: ...

class ListImagesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListLayersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LayerFacts(_message.Message):
    __slots__ = ("id", "size_bytes", "metadata_offset", "entries_count", "content_bytes", "created_at_s", "made_from", "parents")
    ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    METADATA_OFFSET_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_COUNT_FIELD_NUMBER: _ClassVar[int]
    CONTENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_S_FIELD_NUMBER: _ClassVar[int]
    MADE_FROM_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    size_bytes: int
    metadata_offset: int
    entries_count: int
    content_bytes: int
    created_at_s: float
    made_from: str
    parents: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, id: _Optional[str] = ..., size_bytes: _Optional[int] = ..., metadata_offset: _Optional[int] = ..., entries_count: _Optional[int] = ..., content_bytes: _Optional[int] = ..., created_at_s: _Optional[float] = ..., made_from: _Optional[str] = ..., parents: _Optional[_Iterable[str]] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("name", "layers", "defaults", "entrypoint", "command", "created_at_s", "source", "base")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    ENTRYPOINT_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_S_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    name: str
    layers: _containers.RepeatedScalarFieldContainer[str]
    defaults: Defaults
    entrypoint: _containers.RepeatedScalarFieldContainer[str]
    command: _containers.RepeatedScalarFieldContainer[str]
    created_at_s: float
    source: str
    base: str
    def __init__(self, name: _Optional[str] = ..., layers: _Optional[_Iterable[str]] = ..., defaults: _Optional[_Union[Defaults, _Mapping]] = ..., entrypoint: _Optional[_Iterable[str]] = ..., command: _Optional[_Iterable[str]] = ..., created_at_s: _Optional[float] = ..., source: _Optional[str] = ..., base: _Optional[str] = ...) -> None: ...

class ImportOptions(_message.Message):
    __slots__ = ("name", "reference", "source", "compressed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    COMPRESSED_FIELD_NUMBER: _ClassVar[int]
    name: str
    reference: str
    source: str
    compressed: bool
    def __init__(self, name: _Optional[str] = ..., reference: _Optional[str] = ..., source: _Optional[str] = ..., compressed: _Optional[bool] = ...) -> None: ...

class ImportImageRequest(_message.Message):
    __slots__ = ("options", "data")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    options: ImportOptions
    data: bytes
    def __init__(self, options: _Optional[_Union[ImportOptions, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ImportImageReply(_message.Message):
    __slots__ = ("received_bytes", "image")
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    received_bytes: int
    image: Image
    def __init__(self, received_bytes: _Optional[int] = ..., image: _Optional[_Union[Image, _Mapping]] = ...) -> None: ...

class TagImageRequest(_message.Message):
    __slots__ = ("name", "references")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    name: str
    references: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., references: _Optional[_Iterable[str]] = ...) -> None: ...

class RemoveImageRequest(_message.Message):
    __slots__ = ("reference",)
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    reference: str
    def __init__(self, reference: _Optional[str] = ...) -> None: ...

class CollectLayersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CollectedLayers(_message.Message):
    __slots__ = ("layer_ids",)
    LAYER_IDS_FIELD_NUMBER: _ClassVar[int]
    layer_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, layer_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class CallRequest(_message.Message):
    __slots__ = ("id", "method", "request")
    ID_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    id: int
    method: str
    request: bytes
    def __init__(self, id: _Optional[int] = ..., method: _Optional[str] = ..., request: _Optional[bytes] = ...) -> None: ...

class CallRequests(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[CallRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[CallRequest, _Mapping]]] = ...) -> None: ...

class CallReply(_message.Message):
    __slots__ = ("id", "status", "details", "reply")
    ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    id: int
    status: int
    details: str
    reply: bytes
    def __init__(self, id: _Optional[int] = ..., status: _Optional[int] = ..., details: _Optional[str] = ..., reply: _Optional[bytes] = ...) -> None: ...

class CallReplies(_message.Message):
    __slots__ = ("replies",)
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    replies: _containers.RepeatedCompositeFieldContainer[CallReply]
    def __init__(self, replies: _Optional[_Iterable[_Union[CallReply, _Mapping]]] = ...) -> None: ...
