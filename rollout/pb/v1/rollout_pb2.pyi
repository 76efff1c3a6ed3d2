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
    THINKING_NONE: _ClassVar[Thinking]
    THINKING_HIGH: _ClassVar[Thinking]
    THINKING_MAX: _ClassVar[Thinking]

class Agent(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AGENT_UNSPECIFIED: _ClassVar[Agent]
    AGENT_MODEL: _ClassVar[Agent]
    AGENT_ORACLE: _ClassVar[Agent]
    AGENT_NOP: _ClassVar[Agent]

class ParsePolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PARSE_POLICY_UNSPECIFIED: _ClassVar[ParsePolicy]
    PARSE_POLICY_STRICT: _ClassVar[ParsePolicy]
    PARSE_POLICY_TOLERANT: _ClassVar[ParsePolicy]

class OnUpdate(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ON_UPDATE_UNSPECIFIED: _ClassVar[OnUpdate]
    ON_UPDATE_KEEP: _ClassVar[OnUpdate]
    ON_UPDATE_CUT: _ClassVar[OnUpdate]
    ON_UPDATE_PIN: _ClassVar[OnUpdate]

class Field(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FIELD_UNSPECIFIED: _ClassVar[Field]
    FIELD_LIVE_TOKENS: _ClassVar[Field]
    FIELD_TOKENS: _ClassVar[Field]
    FIELD_LOGPROBS: _ClassVar[Field]
    FIELD_TEXT: _ClassVar[Field]
    FIELD_TOPK: _ClassVar[Field]
    FIELD_SAMPLING_MASK: _ClassVar[Field]
    FIELD_ROUTES: _ClassVar[Field]
    FIELD_HIDDEN: _ClassVar[Field]

class PauseMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PAUSE_MODE_UNSPECIFIED: _ClassVar[PauseMode]
    PAUSE_MODE_KEEP: _ClassVar[PauseMode]
    PAUSE_MODE_WAIT: _ClassVar[PauseMode]
    PAUSE_MODE_ABORT: _ClassVar[PauseMode]

class RolloutState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLLOUT_STATE_UNSPECIFIED: _ClassVar[RolloutState]
    ROLLOUT_STATE_QUEUED: _ClassVar[RolloutState]
    ROLLOUT_STATE_RUNNING: _ClassVar[RolloutState]
    ROLLOUT_STATE_PREEMPTED: _ClassVar[RolloutState]
    ROLLOUT_STATE_FAILED: _ClassVar[RolloutState]
    ROLLOUT_STATE_ENDED: _ClassVar[RolloutState]
    ROLLOUT_STATE_AWAITING_WEIGHTS: _ClassVar[RolloutState]

class QuickAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    QUICK_ACTION_UNSPECIFIED: _ClassVar[QuickAction]
    QUICK_ACTION_SEARCH: _ClassVar[QuickAction]
    QUICK_ACTION_ANSWER: _ClassVar[QuickAction]
THINKING_UNSPECIFIED: Thinking
THINKING_NONE: Thinking
THINKING_HIGH: Thinking
THINKING_MAX: Thinking
AGENT_UNSPECIFIED: Agent
AGENT_MODEL: Agent
AGENT_ORACLE: Agent
AGENT_NOP: Agent
PARSE_POLICY_UNSPECIFIED: ParsePolicy
PARSE_POLICY_STRICT: ParsePolicy
PARSE_POLICY_TOLERANT: ParsePolicy
ON_UPDATE_UNSPECIFIED: OnUpdate
ON_UPDATE_KEEP: OnUpdate
ON_UPDATE_CUT: OnUpdate
ON_UPDATE_PIN: OnUpdate
FIELD_UNSPECIFIED: Field
FIELD_LIVE_TOKENS: Field
FIELD_TOKENS: Field
FIELD_LOGPROBS: Field
FIELD_TEXT: Field
FIELD_TOPK: Field
FIELD_SAMPLING_MASK: Field
FIELD_ROUTES: Field
FIELD_HIDDEN: Field
PAUSE_MODE_UNSPECIFIED: PauseMode
PAUSE_MODE_KEEP: PauseMode
PAUSE_MODE_WAIT: PauseMode
PAUSE_MODE_ABORT: PauseMode
ROLLOUT_STATE_UNSPECIFIED: RolloutState
ROLLOUT_STATE_QUEUED: RolloutState
ROLLOUT_STATE_RUNNING: RolloutState
ROLLOUT_STATE_PREEMPTED: RolloutState
ROLLOUT_STATE_FAILED: RolloutState
ROLLOUT_STATE_ENDED: RolloutState
ROLLOUT_STATE_AWAITING_WEIGHTS: RolloutState
QUICK_ACTION_UNSPECIFIED: QuickAction
QUICK_ACTION_SEARCH: QuickAction
QUICK_ACTION_ANSWER: QuickAction

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

class TokenIds(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Conversation(_message.Message):
    __slots__ = ("name", "messages_json", "tokens")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_JSON_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    name: str
    messages_json: str
    tokens: TokenIds
    def __init__(self, name: _Optional[str] = ..., messages_json: _Optional[str] = ..., tokens: _Optional[_Union[TokenIds, _Mapping]] = ...) -> None: ...

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
    __slots__ = ("turns_count_max", "turn_tokens_count_max", "context_tokens_count_max", "sampled_tokens_count_max", "thinking_tokens_count_max", "tool_timeout_s", "wall_clock_s")
    TURNS_COUNT_MAX_FIELD_NUMBER: _ClassVar[int]
    TURN_TOKENS_COUNT_MAX_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_COUNT_MAX_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_TOKENS_COUNT_MAX_FIELD_NUMBER: _ClassVar[int]
    THINKING_TOKENS_COUNT_MAX_FIELD_NUMBER: _ClassVar[int]
    TOOL_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    WALL_CLOCK_S_FIELD_NUMBER: _ClassVar[int]
    turns_count_max: int
    turn_tokens_count_max: int
    context_tokens_count_max: int
    sampled_tokens_count_max: int
    thinking_tokens_count_max: int
    tool_timeout_s: float
    wall_clock_s: float
    def __init__(self, turns_count_max: _Optional[int] = ..., turn_tokens_count_max: _Optional[int] = ..., context_tokens_count_max: _Optional[int] = ..., sampled_tokens_count_max: _Optional[int] = ..., thinking_tokens_count_max: _Optional[int] = ..., tool_timeout_s: _Optional[float] = ..., wall_clock_s: _Optional[float] = ...) -> None: ...

class EarlyStop(_message.Message):
    __slots__ = ("min_usable", "grace_s")
    MIN_USABLE_FIELD_NUMBER: _ClassVar[int]
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    min_usable: int
    grace_s: float
    def __init__(self, min_usable: _Optional[int] = ..., grace_s: _Optional[float] = ...) -> None: ...

class PolicyRule(_message.Message):
    __slots__ = ("min_version", "max_lag", "on_update")
    MIN_VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_LAG_FIELD_NUMBER: _ClassVar[int]
    ON_UPDATE_FIELD_NUMBER: _ClassVar[int]
    min_version: int
    max_lag: int
    on_update: OnUpdate
    def __init__(self, min_version: _Optional[int] = ..., max_lag: _Optional[int] = ..., on_update: _Optional[_Union[OnUpdate, str]] = ...) -> None: ...

class TestsReward(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NoReward(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CallableReward(_message.Message):
    __slots__ = ("target",)
    TARGET_FIELD_NUMBER: _ClassVar[int]
    target: str
    def __init__(self, target: _Optional[str] = ...) -> None: ...

class JudgeReward(_message.Message):
    __slots__ = ("rubric", "samples_count", "attempts_max", "thinking", "sampling")
    RUBRIC_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_COUNT_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_MAX_FIELD_NUMBER: _ClassVar[int]
    THINKING_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    rubric: str
    samples_count: int
    attempts_max: int
    thinking: Thinking
    sampling: Sampling
    def __init__(self, rubric: _Optional[str] = ..., samples_count: _Optional[int] = ..., attempts_max: _Optional[int] = ..., thinking: _Optional[_Union[Thinking, str]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ...) -> None: ...

class Reward(_message.Message):
    __slots__ = ("tests", "none", "callable", "judge")
    TESTS_FIELD_NUMBER: _ClassVar[int]
    NONE_FIELD_NUMBER: _ClassVar[int]
    CALLABLE_FIELD_NUMBER: _ClassVar[int]
    JUDGE_FIELD_NUMBER: _ClassVar[int]
    tests: TestsReward
    none: NoReward
    callable: CallableReward
    judge: JudgeReward
    def __init__(self, tests: _Optional[_Union[TestsReward, _Mapping]] = ..., none: _Optional[_Union[NoReward, _Mapping]] = ..., callable: _Optional[_Union[CallableReward, _Mapping]] = ..., judge: _Optional[_Union[JudgeReward, _Mapping]] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("request_id", "project", "priority", "deadline_s", "tasks", "bundled_tasks", "conversations", "group_size", "agent", "thinking", "sampling", "limits", "early_stop", "policy", "reward", "parse_policy", "return_mask", "top_logprobs_count")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    BUNDLED_TASKS_FIELD_NUMBER: _ClassVar[int]
    CONVERSATIONS_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    THINKING_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    EARLY_STOP_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    PARSE_POLICY_FIELD_NUMBER: _ClassVar[int]
    RETURN_MASK_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_COUNT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    project: str
    priority: int
    deadline_s: float
    tasks: _containers.RepeatedCompositeFieldContainer[TaskFolder]
    bundled_tasks: _containers.RepeatedScalarFieldContainer[str]
    conversations: _containers.RepeatedCompositeFieldContainer[Conversation]
    group_size: int
    agent: Agent
    thinking: Thinking
    sampling: Sampling
    limits: Limits
    early_stop: EarlyStop
    policy: PolicyRule
    reward: Reward
    parse_policy: ParsePolicy
    return_mask: _containers.RepeatedScalarFieldContainer[Field]
    top_logprobs_count: int
    def __init__(self, request_id: _Optional[str] = ..., project: _Optional[str] = ..., priority: _Optional[int] = ..., deadline_s: _Optional[float] = ..., tasks: _Optional[_Iterable[_Union[TaskFolder, _Mapping]]] = ..., bundled_tasks: _Optional[_Iterable[str]] = ..., conversations: _Optional[_Iterable[_Union[Conversation, _Mapping]]] = ..., group_size: _Optional[int] = ..., agent: _Optional[_Union[Agent, str]] = ..., thinking: _Optional[_Union[Thinking, str]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., early_stop: _Optional[_Union[EarlyStop, _Mapping]] = ..., policy: _Optional[_Union[PolicyRule, _Mapping]] = ..., reward: _Optional[_Union[Reward, _Mapping]] = ..., parse_policy: _Optional[_Union[ParsePolicy, str]] = ..., return_mask: _Optional[_Iterable[_Union[Field, str]]] = ..., top_logprobs_count: _Optional[int] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("request_id", "from_event", "return_mask")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FROM_EVENT_FIELD_NUMBER: _ClassVar[int]
    RETURN_MASK_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    from_event: int
    return_mask: _containers.RepeatedScalarFieldContainer[Field]
    def __init__(self, request_id: _Optional[str] = ..., from_event: _Optional[int] = ..., return_mask: _Optional[_Iterable[_Union[Field, str]]] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("event", "rollout_id", "is_last", "opened", "resumed", "preempted", "kv_broke", "sandbox_prepared", "network_switched", "tokens", "forced", "tool_answered", "solution_applied", "agent_stopped", "judged", "finished", "infra_failed", "group_finished")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    PREEMPTED_FIELD_NUMBER: _ClassVar[int]
    KV_BROKE_FIELD_NUMBER: _ClassVar[int]
    SANDBOX_PREPARED_FIELD_NUMBER: _ClassVar[int]
    NETWORK_SWITCHED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FORCED_FIELD_NUMBER: _ClassVar[int]
    TOOL_ANSWERED_FIELD_NUMBER: _ClassVar[int]
    SOLUTION_APPLIED_FIELD_NUMBER: _ClassVar[int]
    AGENT_STOPPED_FIELD_NUMBER: _ClassVar[int]
    JUDGED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    INFRA_FAILED_FIELD_NUMBER: _ClassVar[int]
    GROUP_FINISHED_FIELD_NUMBER: _ClassVar[int]
    event: int
    rollout_id: str
    is_last: bool
    opened: Opened
    resumed: Resumed
    preempted: Preempted
    kv_broke: KvBreak
    sandbox_prepared: SandboxPrepared
    network_switched: NetworkSwitched
    tokens: Tokens
    forced: Forced
    tool_answered: ToolAnswered
    solution_applied: SolutionApplied
    agent_stopped: AgentStopped
    judged: Judged
    finished: Trajectory
    infra_failed: InfraFailure
    group_finished: GroupFinished
    def __init__(self, event: _Optional[int] = ..., rollout_id: _Optional[str] = ..., is_last: _Optional[bool] = ..., opened: _Optional[_Union[Opened, _Mapping]] = ..., resumed: _Optional[_Union[Resumed, _Mapping]] = ..., preempted: _Optional[_Union[Preempted, _Mapping]] = ..., kv_broke: _Optional[_Union[KvBreak, _Mapping]] = ..., sandbox_prepared: _Optional[_Union[SandboxPrepared, _Mapping]] = ..., network_switched: _Optional[_Union[NetworkSwitched, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., forced: _Optional[_Union[Forced, _Mapping]] = ..., tool_answered: _Optional[_Union[ToolAnswered, _Mapping]] = ..., solution_applied: _Optional[_Union[SolutionApplied, _Mapping]] = ..., agent_stopped: _Optional[_Union[AgentStopped, _Mapping]] = ..., judged: _Optional[_Union[Judged, _Mapping]] = ..., finished: _Optional[_Union[Trajectory, _Mapping]] = ..., infra_failed: _Optional[_Union[InfraFailure, _Mapping]] = ..., group_finished: _Optional[_Union[GroupFinished, _Mapping]] = ...) -> None: ...

class GroupFinished(_message.Message):
    __slots__ = ("group_id", "size", "rollout_ids", "missing_reasons")
    class MissingReasonsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_IDS_FIELD_NUMBER: _ClassVar[int]
    MISSING_REASONS_FIELD_NUMBER: _ClassVar[int]
    group_id: str
    size: int
    rollout_ids: _containers.RepeatedScalarFieldContainer[str]
    missing_reasons: _containers.ScalarMap[int, str]
    def __init__(self, group_id: _Optional[str] = ..., size: _Optional[int] = ..., rollout_ids: _Optional[_Iterable[str]] = ..., missing_reasons: _Optional[_Mapping[int, str]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("task", "group_id", "group_index", "prompt_tokens_count")
    TASK_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_INDEX_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_COUNT_FIELD_NUMBER: _ClassVar[int]
    task: str
    group_id: str
    group_index: int
    prompt_tokens_count: int
    def __init__(self, task: _Optional[str] = ..., group_id: _Optional[str] = ..., group_index: _Optional[int] = ..., prompt_tokens_count: _Optional[int] = ...) -> None: ...

class Resumed(_message.Message):
    __slots__ = ("attempt", "tokens_count", "kv", "preempted_s")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_COUNT_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    PREEMPTED_S_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    tokens_count: int
    kv: str
    preempted_s: float
    def __init__(self, attempt: _Optional[int] = ..., tokens_count: _Optional[int] = ..., kv: _Optional[str] = ..., preempted_s: _Optional[float] = ...) -> None: ...

class Preempted(_message.Message):
    __slots__ = ("cause",)
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    cause: str
    def __init__(self, cause: _Optional[str] = ...) -> None: ...

class KvBreak(_message.Message):
    __slots__ = ("position", "cause")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    position: int
    cause: str
    def __init__(self, position: _Optional[int] = ..., cause: _Optional[str] = ...) -> None: ...

class SandboxPrepared(_message.Message):
    __slots__ = ("duration_s",)
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    duration_s: float
    def __init__(self, duration_s: _Optional[float] = ...) -> None: ...

class NetworkSwitched(_message.Message):
    __slots__ = ("phase",)
    PHASE_FIELD_NUMBER: _ClassVar[int]
    phase: str
    def __init__(self, phase: _Optional[str] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("start", "token_ids", "logprobs", "policy_version")
    START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    start: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    policy_version: int
    def __init__(self, start: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., policy_version: _Optional[int] = ...) -> None: ...

class Forced(_message.Message):
    __slots__ = ("start", "token_ids")
    START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    start: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, start: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ToolAnswered(_message.Message):
    __slots__ = ("call_index", "observation", "exit_code", "timed_out", "truncated_bytes", "duration_s")
    CALL_INDEX_FIELD_NUMBER: _ClassVar[int]
    OBSERVATION_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    TIMED_OUT_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    call_index: int
    observation: str
    exit_code: int
    timed_out: bool
    truncated_bytes: int
    duration_s: float
    def __init__(self, call_index: _Optional[int] = ..., observation: _Optional[str] = ..., exit_code: _Optional[int] = ..., timed_out: _Optional[bool] = ..., truncated_bytes: _Optional[int] = ..., duration_s: _Optional[float] = ...) -> None: ...

class SolutionApplied(_message.Message):
    __slots__ = ("exit_code", "duration_s")
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    exit_code: int
    duration_s: float
    def __init__(self, exit_code: _Optional[int] = ..., duration_s: _Optional[float] = ...) -> None: ...

class AgentStopped(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Judged(_message.Message):
    __slots__ = ("reward", "components", "verifier_id", "verifier_digest", "duration_s", "judge_rollout_ids")
    class ComponentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    REWARD_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_ID_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    JUDGE_ROLLOUT_IDS_FIELD_NUMBER: _ClassVar[int]
    reward: float
    components: _containers.ScalarMap[str, float]
    verifier_id: str
    verifier_digest: str
    duration_s: float
    judge_rollout_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, reward: _Optional[float] = ..., components: _Optional[_Mapping[str, float]] = ..., verifier_id: _Optional[str] = ..., verifier_digest: _Optional[str] = ..., duration_s: _Optional[float] = ..., judge_rollout_ids: _Optional[_Iterable[str]] = ...) -> None: ...

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

class ListRequest(_message.Message):
    __slots__ = ("request_id", "group_id", "project", "states", "unacknowledged_only", "page_size", "page_token")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    UNACKNOWLEDGED_ONLY_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    group_id: str
    project: str
    states: _containers.RepeatedScalarFieldContainer[RolloutState]
    unacknowledged_only: bool
    page_size: int
    page_token: str
    def __init__(self, request_id: _Optional[str] = ..., group_id: _Optional[str] = ..., project: _Optional[str] = ..., states: _Optional[_Iterable[_Union[RolloutState, str]]] = ..., unacknowledged_only: _Optional[bool] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("rollouts", "next_page_token")
    ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    rollouts: _containers.RepeatedCompositeFieldContainer[RolloutSummary]
    next_page_token: str
    def __init__(self, rollouts: _Optional[_Iterable[_Union[RolloutSummary, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class RolloutSummary(_message.Message):
    __slots__ = ("rollout_id", "request_id", "project", "group_id", "group_index", "state", "finish_reason", "reward", "tokens_count", "last_event", "is_acknowledged")
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_INDEX_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    TOKENS_COUNT_FIELD_NUMBER: _ClassVar[int]
    LAST_EVENT_FIELD_NUMBER: _ClassVar[int]
    IS_ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    request_id: str
    project: str
    group_id: str
    group_index: int
    state: RolloutState
    finish_reason: str
    reward: float
    tokens_count: int
    last_event: int
    is_acknowledged: bool
    def __init__(self, rollout_id: _Optional[str] = ..., request_id: _Optional[str] = ..., project: _Optional[str] = ..., group_id: _Optional[str] = ..., group_index: _Optional[int] = ..., state: _Optional[_Union[RolloutState, str]] = ..., finish_reason: _Optional[str] = ..., reward: _Optional[float] = ..., tokens_count: _Optional[int] = ..., last_event: _Optional[int] = ..., is_acknowledged: _Optional[bool] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class CancelResponse(_message.Message):
    __slots__ = ("cancelled_count",)
    CANCELLED_COUNT_FIELD_NUMBER: _ClassVar[int]
    cancelled_count: int
    def __init__(self, cancelled_count: _Optional[int] = ...) -> None: ...

class RolloutIds(_message.Message):
    __slots__ = ("rollout_ids",)
    ROLLOUT_IDS_FIELD_NUMBER: _ClassVar[int]
    rollout_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, rollout_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class PreemptRequest(_message.Message):
    __slots__ = ("rollouts", "request_id", "everything", "cause")
    ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EVERYTHING_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    rollouts: RolloutIds
    request_id: str
    everything: bool
    cause: str
    def __init__(self, rollouts: _Optional[_Union[RolloutIds, _Mapping]] = ..., request_id: _Optional[str] = ..., everything: _Optional[bool] = ..., cause: _Optional[str] = ...) -> None: ...

class PreemptResponse(_message.Message):
    __slots__ = ("rollout_ids",)
    ROLLOUT_IDS_FIELD_NUMBER: _ClassVar[int]
    rollout_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, rollout_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ("rollouts", "request_id", "everything")
    ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EVERYTHING_FIELD_NUMBER: _ClassVar[int]
    rollouts: RolloutIds
    request_id: str
    everything: bool
    def __init__(self, rollouts: _Optional[_Union[RolloutIds, _Mapping]] = ..., request_id: _Optional[str] = ..., everything: _Optional[bool] = ...) -> None: ...

class ResumeResponse(_message.Message):
    __slots__ = ("rollout_ids",)
    ROLLOUT_IDS_FIELD_NUMBER: _ClassVar[int]
    rollout_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, rollout_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class PauseEngineRequest(_message.Message):
    __slots__ = ("mode",)
    MODE_FIELD_NUMBER: _ClassVar[int]
    mode: PauseMode
    def __init__(self, mode: _Optional[_Union[PauseMode, str]] = ...) -> None: ...

class PauseEngineResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeEngineRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeEngineResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UpdatePolicyRequest(_message.Message):
    __slots__ = ("checkpoint", "policy_version")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    checkpoint: str
    policy_version: int
    def __init__(self, checkpoint: _Optional[str] = ..., policy_version: _Optional[int] = ...) -> None: ...

class UpdatePolicyResponse(_message.Message):
    __slots__ = ("engine", "stale_rollout_ids")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    STALE_ROLLOUT_IDS_FIELD_NUMBER: _ClassVar[int]
    engine: EngineInfo
    stale_rollout_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, engine: _Optional[_Union[EngineInfo, _Mapping]] = ..., stale_rollout_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class EngineInfo(_message.Message):
    __slots__ = ("name", "build", "weights_digest", "vocab_count", "context_tokens_max", "policy_version", "routing", "hidden_dim")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VOCAB_COUNT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROUTING_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_DIM_FIELD_NUMBER: _ClassVar[int]
    name: str
    build: str
    weights_digest: str
    vocab_count: int
    context_tokens_max: int
    policy_version: int
    routing: Routing
    hidden_dim: int
    def __init__(self, name: _Optional[str] = ..., build: _Optional[str] = ..., weights_digest: _Optional[str] = ..., vocab_count: _Optional[int] = ..., context_tokens_max: _Optional[int] = ..., policy_version: _Optional[int] = ..., routing: _Optional[_Union[Routing, _Mapping]] = ..., hidden_dim: _Optional[int] = ...) -> None: ...

class Routing(_message.Message):
    __slots__ = ("layer_ids", "experts_count", "top_k")
    LAYER_IDS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    layer_ids: _containers.RepeatedScalarFieldContainer[int]
    experts_count: int
    top_k: int
    def __init__(self, layer_ids: _Optional[_Iterable[int]] = ..., experts_count: _Optional[int] = ..., top_k: _Optional[int] = ...) -> None: ...

class AckRequest(_message.Message):
    __slots__ = ("rollout_ids",)
    ROLLOUT_IDS_FIELD_NUMBER: _ClassVar[int]
    rollout_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, rollout_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class AckResponse(_message.Message):
    __slots__ = ("acknowledged_count",)
    ACKNOWLEDGED_COUNT_FIELD_NUMBER: _ClassVar[int]
    acknowledged_count: int
    def __init__(self, acknowledged_count: _Optional[int] = ...) -> None: ...

class ReplayRequest(_message.Message):
    __slots__ = ("rollout_id", "from_event", "return_mask")
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    FROM_EVENT_FIELD_NUMBER: _ClassVar[int]
    RETURN_MASK_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    from_event: int
    return_mask: _containers.RepeatedScalarFieldContainer[Field]
    def __init__(self, rollout_id: _Optional[str] = ..., from_event: _Optional[int] = ..., return_mask: _Optional[_Iterable[_Union[Field, str]]] = ...) -> None: ...

class ScoreTokensRequest(_message.Message):
    __slots__ = ("token_ids", "top_logprobs_count", "returns_hidden")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_COUNT_FIELD_NUMBER: _ClassVar[int]
    RETURNS_HIDDEN_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs_count: int
    returns_hidden: bool
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., top_logprobs_count: _Optional[int] = ..., returns_hidden: _Optional[bool] = ...) -> None: ...

class ScoreTokensResponse(_message.Message):
    __slots__ = ("policy_version", "logprobs", "top_logprobs", "hidden")
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    policy_version: int
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    top_logprobs: _containers.RepeatedCompositeFieldContainer[TopLogprobs]
    hidden: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, policy_version: _Optional[int] = ..., logprobs: _Optional[_Iterable[float]] = ..., top_logprobs: _Optional[_Iterable[_Union[TopLogprobs, _Mapping]]] = ..., hidden: _Optional[_Iterable[bytes]] = ...) -> None: ...

class TopLogprobs(_message.Message):
    __slots__ = ("token_ids", "logprobs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class QuickInstructionRequest(_message.Message):
    __slots__ = ("request_id", "rollout_id", "instructions", "answer_tokens_count_max", "sampling")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTIONS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_TOKENS_COUNT_MAX_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    rollout_id: str
    instructions: _containers.RepeatedCompositeFieldContainer[Instruction]
    answer_tokens_count_max: int
    sampling: Sampling
    def __init__(self, request_id: _Optional[str] = ..., rollout_id: _Optional[str] = ..., instructions: _Optional[_Iterable[_Union[Instruction, _Mapping]]] = ..., answer_tokens_count_max: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ...) -> None: ...

class Instruction(_message.Message):
    __slots__ = ("task", "url")
    TASK_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    task: str
    url: str
    def __init__(self, task: _Optional[str] = ..., url: _Optional[str] = ...) -> None: ...

class QuickInstructionResponse(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[QuickAnswer]
    def __init__(self, answers: _Optional[_Iterable[_Union[QuickAnswer, _Mapping]]] = ...) -> None: ...

class QuickAnswer(_message.Message):
    __slots__ = ("task", "text", "is_complete", "rollout_id", "action", "queries", "title", "label", "unread", "prompt_tokens_count", "cached_tokens_count", "answer_tokens_count")
    TASK_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IS_COMPLETE_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    UNREAD_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_COUNT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_COUNT_FIELD_NUMBER: _ClassVar[int]
    ANSWER_TOKENS_COUNT_FIELD_NUMBER: _ClassVar[int]
    task: str
    text: str
    is_complete: bool
    rollout_id: str
    action: QuickAction
    queries: _containers.RepeatedScalarFieldContainer[str]
    title: str
    label: str
    unread: str
    prompt_tokens_count: int
    cached_tokens_count: int
    answer_tokens_count: int
    def __init__(self, task: _Optional[str] = ..., text: _Optional[str] = ..., is_complete: _Optional[bool] = ..., rollout_id: _Optional[str] = ..., action: _Optional[_Union[QuickAction, str]] = ..., queries: _Optional[_Iterable[str]] = ..., title: _Optional[str] = ..., label: _Optional[str] = ..., unread: _Optional[str] = ..., prompt_tokens_count: _Optional[int] = ..., cached_tokens_count: _Optional[int] = ..., answer_tokens_count: _Optional[int] = ...) -> None: ...

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

class Place(_message.Message):
    __slots__ = ("start", "length")
    START_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    start: int
    length: int
    def __init__(self, start: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class VersionRun(_message.Message):
    __slots__ = ("start", "length", "version", "weights_digest", "engine_id", "engine_build")
    START_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_BUILD_FIELD_NUMBER: _ClassVar[int]
    start: int
    length: int
    version: int
    weights_digest: str
    engine_id: str
    engine_build: str
    def __init__(self, start: _Optional[int] = ..., length: _Optional[int] = ..., version: _Optional[int] = ..., weights_digest: _Optional[str] = ..., engine_id: _Optional[str] = ..., engine_build: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("call_index", "turn", "name", "arguments_json", "span", "parse_status", "exit", "timed_out", "duration_s", "result_span", "truncated_bytes", "replayed", "outcome_unknown", "result")
    CALL_INDEX_FIELD_NUMBER: _ClassVar[int]
    TURN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_JSON_FIELD_NUMBER: _ClassVar[int]
    SPAN_FIELD_NUMBER: _ClassVar[int]
    PARSE_STATUS_FIELD_NUMBER: _ClassVar[int]
    EXIT_FIELD_NUMBER: _ClassVar[int]
    TIMED_OUT_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    RESULT_SPAN_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    call_index: int
    turn: int
    name: str
    arguments_json: str
    span: Place
    parse_status: str
    exit: int
    timed_out: bool
    duration_s: float
    result_span: Place
    truncated_bytes: int
    replayed: bool
    outcome_unknown: bool
    result: str
    def __init__(self, call_index: _Optional[int] = ..., turn: _Optional[int] = ..., name: _Optional[str] = ..., arguments_json: _Optional[str] = ..., span: _Optional[_Union[Place, _Mapping]] = ..., parse_status: _Optional[str] = ..., exit: _Optional[int] = ..., timed_out: _Optional[bool] = ..., duration_s: _Optional[float] = ..., result_span: _Optional[_Union[Place, _Mapping]] = ..., truncated_bytes: _Optional[int] = ..., replayed: _Optional[bool] = ..., outcome_unknown: _Optional[bool] = ..., result: _Optional[str] = ...) -> None: ...

class RewardRecord(_message.Message):
    __slots__ = ("value", "components", "verifier_id", "verifier_digest", "judge_rollout_ids")
    class ComponentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VALUE_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_ID_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    JUDGE_ROLLOUT_IDS_FIELD_NUMBER: _ClassVar[int]
    value: float
    components: _containers.ScalarMap[str, float]
    verifier_id: str
    verifier_digest: str
    judge_rollout_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, value: _Optional[float] = ..., components: _Optional[_Mapping[str, float]] = ..., verifier_id: _Optional[str] = ..., verifier_digest: _Optional[str] = ..., judge_rollout_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class Membership(_message.Message):
    __slots__ = ("group_id", "index", "size", "missing_reasons")
    class MissingReasonsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    MISSING_REASONS_FIELD_NUMBER: _ClassVar[int]
    group_id: str
    index: int
    size: int
    missing_reasons: _containers.ScalarMap[int, str]
    def __init__(self, group_id: _Optional[str] = ..., index: _Optional[int] = ..., size: _Optional[int] = ..., missing_reasons: _Optional[_Mapping[int, str]] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_s", "prefill_s", "decode_s", "environment_s", "judge_s", "log_s", "sandbox_start_s", "preempted_s", "cached_tokens_count")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_S_FIELD_NUMBER: _ClassVar[int]
    JUDGE_S_FIELD_NUMBER: _ClassVar[int]
    LOG_S_FIELD_NUMBER: _ClassVar[int]
    SANDBOX_START_S_FIELD_NUMBER: _ClassVar[int]
    PREEMPTED_S_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_COUNT_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    prefill_s: float
    decode_s: float
    environment_s: float
    judge_s: float
    log_s: float
    sandbox_start_s: float
    preempted_s: float
    cached_tokens_count: int
    def __init__(self, queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., decode_s: _Optional[float] = ..., environment_s: _Optional[float] = ..., judge_s: _Optional[float] = ..., log_s: _Optional[float] = ..., sandbox_start_s: _Optional[float] = ..., preempted_s: _Optional[float] = ..., cached_tokens_count: _Optional[int] = ...) -> None: ...

class LogRange(_message.Message):
    __slots__ = ("first_lsn", "last_lsn", "digest")
    FIRST_LSN_FIELD_NUMBER: _ClassVar[int]
    LAST_LSN_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    first_lsn: int
    last_lsn: int
    digest: str
    def __init__(self, first_lsn: _Optional[int] = ..., last_lsn: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class Lineage(_message.Message):
    __slots__ = ("attempt", "resumed_from", "judged_rollout_id")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FROM_FIELD_NUMBER: _ClassVar[int]
    JUDGED_ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    resumed_from: _containers.RepeatedScalarFieldContainer[int]
    judged_rollout_id: str
    def __init__(self, attempt: _Optional[int] = ..., resumed_from: _Optional[_Iterable[int]] = ..., judged_rollout_id: _Optional[str] = ...) -> None: ...

class SideChannel(_message.Message):
    __slots__ = ("name", "uri", "dtype", "shape", "layer_ids", "row_range", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    URI_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    LAYER_IDS_FIELD_NUMBER: _ClassVar[int]
    ROW_RANGE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    uri: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    layer_ids: _containers.RepeatedScalarFieldContainer[int]
    row_range: _containers.RepeatedScalarFieldContainer[int]
    sha256: str
    def __init__(self, name: _Optional[str] = ..., uri: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., layer_ids: _Optional[_Iterable[int]] = ..., row_range: _Optional[_Iterable[int]] = ..., sha256: _Optional[str] = ...) -> None: ...

class Encoder(_message.Message):
    __slots__ = ("dialect", "tokenizer_digest")
    DIALECT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    dialect: str
    tokenizer_digest: str
    def __init__(self, dialect: _Optional[str] = ..., tokenizer_digest: _Optional[str] = ...) -> None: ...

class Trajectory(_message.Message):
    __slots__ = ("rollout_id", "request_id", "project", "task", "task_digest", "agent", "thinking", "token_ids", "spans", "logprobs", "logprobs_mode", "policy_versions", "kv_breaks", "turns", "finish_reason", "infra_failure", "reward", "verifier_output", "solution_output", "group", "tool_calls", "timing", "preempt_count", "tokens_sampled", "tokens_replayed", "tokens_regenerated", "commands_replayed", "commands_run_twice", "wal", "lineage", "side_channels", "encoder", "sampling_effective", "topk_offsets", "topk_ids", "topk_logprobs", "mask_offsets", "mask_ids")
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    TASK_DIGEST_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    THINKING_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_MODE_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    KV_BREAKS_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    INFRA_FAILURE_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    SOLUTION_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALLS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    PREEMPT_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_SAMPLED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_REPLAYED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_REGENERATED_FIELD_NUMBER: _ClassVar[int]
    COMMANDS_REPLAYED_FIELD_NUMBER: _ClassVar[int]
    COMMANDS_RUN_TWICE_FIELD_NUMBER: _ClassVar[int]
    WAL_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    SIDE_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_EFFECTIVE_FIELD_NUMBER: _ClassVar[int]
    TOPK_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    TOPK_IDS_FIELD_NUMBER: _ClassVar[int]
    TOPK_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MASK_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    MASK_IDS_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    request_id: str
    project: str
    task: str
    task_digest: str
    agent: str
    thinking: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    logprobs_mode: str
    policy_versions: _containers.RepeatedCompositeFieldContainer[VersionRun]
    kv_breaks: _containers.RepeatedCompositeFieldContainer[KvBreak]
    turns: _containers.RepeatedCompositeFieldContainer[Turn]
    finish_reason: str
    infra_failure: InfraFailure
    reward: RewardRecord
    verifier_output: str
    solution_output: str
    group: Membership
    tool_calls: _containers.RepeatedCompositeFieldContainer[ToolCall]
    timing: Timing
    preempt_count: int
    tokens_sampled: int
    tokens_replayed: int
    tokens_regenerated: int
    commands_replayed: int
    commands_run_twice: int
    wal: LogRange
    lineage: Lineage
    side_channels: _containers.RepeatedCompositeFieldContainer[SideChannel]
    encoder: Encoder
    sampling_effective: Sampling
    topk_offsets: _containers.RepeatedScalarFieldContainer[int]
    topk_ids: _containers.RepeatedScalarFieldContainer[int]
    topk_logprobs: _containers.RepeatedScalarFieldContainer[float]
    mask_offsets: _containers.RepeatedScalarFieldContainer[int]
    mask_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, rollout_id: _Optional[str] = ..., request_id: _Optional[str] = ..., project: _Optional[str] = ..., task: _Optional[str] = ..., task_digest: _Optional[str] = ..., agent: _Optional[str] = ..., thinking: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., logprobs: _Optional[_Iterable[float]] = ..., logprobs_mode: _Optional[str] = ..., policy_versions: _Optional[_Iterable[_Union[VersionRun, _Mapping]]] = ..., kv_breaks: _Optional[_Iterable[_Union[KvBreak, _Mapping]]] = ..., turns: _Optional[_Iterable[_Union[Turn, _Mapping]]] = ..., finish_reason: _Optional[str] = ..., infra_failure: _Optional[_Union[InfraFailure, _Mapping]] = ..., reward: _Optional[_Union[RewardRecord, _Mapping]] = ..., verifier_output: _Optional[str] = ..., solution_output: _Optional[str] = ..., group: _Optional[_Union[Membership, _Mapping]] = ..., tool_calls: _Optional[_Iterable[_Union[ToolCall, _Mapping]]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., preempt_count: _Optional[int] = ..., tokens_sampled: _Optional[int] = ..., tokens_replayed: _Optional[int] = ..., tokens_regenerated: _Optional[int] = ..., commands_replayed: _Optional[int] = ..., commands_run_twice: _Optional[int] = ..., wal: _Optional[_Union[LogRange, _Mapping]] = ..., lineage: _Optional[_Union[Lineage, _Mapping]] = ..., side_channels: _Optional[_Iterable[_Union[SideChannel, _Mapping]]] = ..., encoder: _Optional[_Union[Encoder, _Mapping]] = ..., sampling_effective: _Optional[_Union[Sampling, _Mapping]] = ..., topk_offsets: _Optional[_Iterable[int]] = ..., topk_ids: _Optional[_Iterable[int]] = ..., topk_logprobs: _Optional[_Iterable[float]] = ..., mask_offsets: _Optional[_Iterable[int]] = ..., mask_ids: _Optional[_Iterable[int]] = ...) -> None: ...
