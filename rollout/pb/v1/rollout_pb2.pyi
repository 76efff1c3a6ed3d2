from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Thinking(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    THINKING_UNSPECIFIED: _ClassVar[Thinking]
    NON_THINK: _ClassVar[Thinking]
    HIGH: _ClassVar[Thinking]
    MAX: _ClassVar[Thinking]

class Agent(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AGENT_UNSPECIFIED: _ClassVar[Agent]
    MODEL: _ClassVar[Agent]
    ORACLE: _ClassVar[Agent]
    NOP: _ClassVar[Agent]

class Field(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FIELD_UNSPECIFIED: _ClassVar[Field]
    TOKENS: _ClassVar[Field]
    LOGPROBS: _ClassVar[Field]
    TEXT: _ClassVar[Field]
THINKING_UNSPECIFIED: Thinking
NON_THINK: Thinking
HIGH: Thinking
MAX: Thinking
AGENT_UNSPECIFIED: Agent
MODEL: Agent
ORACLE: Agent
NOP: Agent
FIELD_UNSPECIFIED: Field
TOKENS: Field
LOGPROBS: Field
TEXT: Field

class TaskFolder(_message.Message):
    __slots__ = ("name", "files")
    class FilesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    name: str
    files: _containers.ScalarMap[str, bytes]
    def __init__(self, name: _Optional[str] = ..., files: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "seed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    seed: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("turns_count_max", "turn_tokens_count_max", "context_tokens_count_max", "tool_timeout_s")
    TURNS_COUNT_MAX_FIELD_NUMBER: _ClassVar[int]
    TURN_TOKENS_COUNT_MAX_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_COUNT_MAX_FIELD_NUMBER: _ClassVar[int]
    TOOL_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    turns_count_max: int
    turn_tokens_count_max: int
    context_tokens_count_max: int
    tool_timeout_s: float
    def __init__(self, turns_count_max: _Optional[int] = ..., turn_tokens_count_max: _Optional[int] = ..., context_tokens_count_max: _Optional[int] = ..., tool_timeout_s: _Optional[float] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("request_id", "tasks", "bundled_tasks", "group_size", "sampling", "thinking", "agent", "limits", "return_mask")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    BUNDLED_TASKS_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    THINKING_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    RETURN_MASK_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tasks: _containers.RepeatedCompositeFieldContainer[TaskFolder]
    bundled_tasks: _containers.RepeatedScalarFieldContainer[str]
    group_size: int
    sampling: Sampling
    thinking: Thinking
    agent: Agent
    limits: Limits
    return_mask: _containers.RepeatedScalarFieldContainer[Field]
    def __init__(self, request_id: _Optional[str] = ..., tasks: _Optional[_Iterable[_Union[TaskFolder, _Mapping]]] = ..., bundled_tasks: _Optional[_Iterable[str]] = ..., group_size: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., thinking: _Optional[_Union[Thinking, str]] = ..., agent: _Optional[_Union[Agent, str]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., return_mask: _Optional[_Iterable[_Union[Field, str]]] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("rollout_id", "opened", "tokens", "tool_answered", "judged", "finished", "infra_failed")
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOOL_ANSWERED_FIELD_NUMBER: _ClassVar[int]
    JUDGED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    INFRA_FAILED_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    opened: Opened
    tokens: Tokens
    tool_answered: ToolAnswered
    judged: Judged
    finished: Trajectory
    infra_failed: InfraFailure
    def __init__(self, rollout_id: _Optional[str] = ..., opened: _Optional[_Union[Opened, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., tool_answered: _Optional[_Union[ToolAnswered, _Mapping]] = ..., judged: _Optional[_Union[Judged, _Mapping]] = ..., finished: _Optional[_Union[Trajectory, _Mapping]] = ..., infra_failed: _Optional[_Union[InfraFailure, _Mapping]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("task", "prompt_tokens_count")
    TASK_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_COUNT_FIELD_NUMBER: _ClassVar[int]
    task: str
    prompt_tokens_count: int
    def __init__(self, task: _Optional[str] = ..., prompt_tokens_count: _Optional[int] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("start", "token_ids", "logprobs")
    START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    start: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, start: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class ToolAnswered(_message.Message):
    __slots__ = ("call_index", "observation", "exit_code")
    CALL_INDEX_FIELD_NUMBER: _ClassVar[int]
    OBSERVATION_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    call_index: int
    observation: str
    exit_code: int
    def __init__(self, call_index: _Optional[int] = ..., observation: _Optional[str] = ..., exit_code: _Optional[int] = ...) -> None: ...

class Judged(_message.Message):
    __slots__ = ("reward", "components")
    class ComponentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    REWARD_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    reward: float
    components: _containers.ScalarMap[str, float]
    def __init__(self, reward: _Optional[float] = ..., components: _Optional[_Mapping[str, float]] = ...) -> None: ...

class InfraFailure(_message.Message):
    __slots__ = ("code", "fault", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    fault: str
    message: str
    def __init__(self, code: _Optional[str] = ..., fault: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("rollout_id", "return_mask")
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    RETURN_MASK_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    return_mask: _containers.RepeatedScalarFieldContainer[Field]
    def __init__(self, rollout_id: _Optional[str] = ..., return_mask: _Optional[_Iterable[_Union[Field, str]]] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class CancelReply(_message.Message):
    __slots__ = ("cancelled_count",)
    CANCELLED_COUNT_FIELD_NUMBER: _ClassVar[int]
    cancelled_count: int
    def __init__(self, cancelled_count: _Optional[int] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("start", "length", "kind", "turn", "trainable")
    START_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TURN_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_FIELD_NUMBER: _ClassVar[int]
    start: int
    length: int
    kind: str
    turn: int
    trainable: bool
    def __init__(self, start: _Optional[int] = ..., length: _Optional[int] = ..., kind: _Optional[str] = ..., turn: _Optional[int] = ..., trainable: _Optional[bool] = ...) -> None: ...

class Turn(_message.Message):
    __slots__ = ("start", "length", "finish_reason", "reasoning", "content", "parse_error")
    START_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    REASONING_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    PARSE_ERROR_FIELD_NUMBER: _ClassVar[int]
    start: int
    length: int
    finish_reason: str
    reasoning: str
    content: str
    parse_error: str
    def __init__(self, start: _Optional[int] = ..., length: _Optional[int] = ..., finish_reason: _Optional[str] = ..., reasoning: _Optional[str] = ..., content: _Optional[str] = ..., parse_error: _Optional[str] = ...) -> None: ...

class ToolCall(_message.Message):
    __slots__ = ("call_index", "turn", "name", "arguments_json", "parse_status", "exit_code", "timed_out", "truncated_bytes", "duration_s", "result")
    CALL_INDEX_FIELD_NUMBER: _ClassVar[int]
    TURN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_JSON_FIELD_NUMBER: _ClassVar[int]
    PARSE_STATUS_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    TIMED_OUT_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    call_index: int
    turn: int
    name: str
    arguments_json: str
    parse_status: str
    exit_code: int
    timed_out: bool
    truncated_bytes: int
    duration_s: float
    result: str
    def __init__(self, call_index: _Optional[int] = ..., turn: _Optional[int] = ..., name: _Optional[str] = ..., arguments_json: _Optional[str] = ..., parse_status: _Optional[str] = ..., exit_code: _Optional[int] = ..., timed_out: _Optional[bool] = ..., truncated_bytes: _Optional[int] = ..., duration_s: _Optional[float] = ..., result: _Optional[str] = ...) -> None: ...

class Trajectory(_message.Message):
    __slots__ = ("rollout_id", "request_id", "task", "group_id", "group_index", "group_size", "reward", "reward_components", "finish_reason", "infra_failure", "tokens_sampled", "tokens_replayed", "commands_replayed", "commands_run_twice", "attempt", "token_ids", "spans", "logprobs", "turns", "tool_calls", "weights_digest", "tokenizer_digest")
    class RewardComponentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_INDEX_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    REWARD_COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    INFRA_FAILURE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_SAMPLED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_REPLAYED_FIELD_NUMBER: _ClassVar[int]
    COMMANDS_REPLAYED_FIELD_NUMBER: _ClassVar[int]
    COMMANDS_RUN_TWICE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALLS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    request_id: str
    task: str
    group_id: str
    group_index: int
    group_size: int
    reward: float
    reward_components: _containers.ScalarMap[str, float]
    finish_reason: str
    infra_failure: InfraFailure
    tokens_sampled: int
    tokens_replayed: int
    commands_replayed: int
    commands_run_twice: int
    attempt: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    turns: _containers.RepeatedCompositeFieldContainer[Turn]
    tool_calls: _containers.RepeatedCompositeFieldContainer[ToolCall]
    weights_digest: str
    tokenizer_digest: str
    def __init__(self, rollout_id: _Optional[str] = ..., request_id: _Optional[str] = ..., task: _Optional[str] = ..., group_id: _Optional[str] = ..., group_index: _Optional[int] = ..., group_size: _Optional[int] = ..., reward: _Optional[float] = ..., reward_components: _Optional[_Mapping[str, float]] = ..., finish_reason: _Optional[str] = ..., infra_failure: _Optional[_Union[InfraFailure, _Mapping]] = ..., tokens_sampled: _Optional[int] = ..., tokens_replayed: _Optional[int] = ..., commands_replayed: _Optional[int] = ..., commands_run_twice: _Optional[int] = ..., attempt: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., logprobs: _Optional[_Iterable[float]] = ..., turns: _Optional[_Iterable[_Union[Turn, _Mapping]]] = ..., tool_calls: _Optional[_Iterable[_Union[ToolCall, _Mapping]]] = ..., weights_digest: _Optional[str] = ..., tokenizer_digest: _Optional[str] = ...) -> None: ...
