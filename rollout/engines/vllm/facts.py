"""What a running vLLM says of itself, and what follows for the port.

Read once, when it is opened: a server that cannot be used (its token route or its development routes are shut, its
logprobs are of another distribution than the one it draws from) is refused then, with the flag that opens it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import msgspec

from dsec.terminal import shortened, visible_line
from rollout.engine import EngineInfo, Routing, SampleRequest, Sampling
from rollout.engines.vllm.connection import Connection
from rollout.engines.vllm.weights import (
    CHANGING,
    UNLABELLED,
    Weights,
    digest_of_name,
    parse_label,
    read_config,
    read_weights,
)
from rollout.engines.vllm.wire import GENERATE, TEMPERATURE_MIN, Choice, Logprobs, body_of, read_npy, sampled_of, words
from rollout.errors import EngineError, RequestError, RolloutError

UNSEEN_VOCAB_COUNT = 1 << 24
"""Of a model whose config.json is not seen here; no tokenizer has the ids that pad a head."""
RANKS_MAX = 4096
_NAME_MAX = 120
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


class _ModelConfig(msgspec.Struct, frozen=True):
    model: str
    max_model_len: int
    logprobs_mode: str
    max_logprobs: int
    dtype: str = ""
    return_sampling_mask: bool = False


class _Scheduler(msgspec.Struct, frozen=True):
    policy: str = "fcfs"


class _Aux(msgspec.Struct, frozen=True):
    enable_return_routed_experts: bool = False


class Parallel(msgspec.Struct, frozen=True):
    """How a server is spread; with a balancer before it, it has only the ranks that are on its host."""

    data_parallel_size: Annotated[int, msgspec.Meta(ge=1, le=RANKS_MAX)] = 1
    data_parallel_size_local: Annotated[int, msgspec.Meta(ge=0, le=RANKS_MAX)] = 1
    data_parallel_external_lb: bool = False
    data_parallel_hybrid_lb: bool = False

    @property
    def ranks_count(self) -> int:
        """Those that a request may be sent to."""
        is_part = self.data_parallel_external_lb or self.data_parallel_hybrid_lb
        return max(self.data_parallel_size_local, 1) if is_part else self.data_parallel_size


class _Config(msgspec.Struct, frozen=True):
    model_config: _ModelConfig
    parallel_config: Parallel = Parallel()
    scheduler_config: _Scheduler = _Scheduler()
    aux_output_config: _Aux = _Aux()


class _ServerInfo(msgspec.Struct, frozen=True):
    vllm_config: _Config


class _Model(msgspec.Struct, frozen=True):
    id: str
    max_model_len: int
    root: str = ""


class _Models(msgspec.Struct, frozen=True):
    data: tuple[_Model, ...]


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """`folder` is where the checkpoint that draws was loaded from, None where this host does not see it.

    Each of the `ranks_count` data-parallel ranks has a prefix cache of its own.
    """

    info: EngineInfo
    folder: Path | None
    has_priorities: bool
    logprobs_max: int
    tells_masks: bool
    ranks_count: int

    def weights(self) -> Weights | None:
        """What is in the folder, if that is still what draws."""
        try:
            found = read_weights(self.folder) if self.folder is not None else None
        except EngineError:
            return None
        return found if found is not None and found.digest == self.info.weights_digest else None

    def check(self, request: SampleRequest) -> None:
        """RequestError for what the server cannot do, beside what no engine can."""
        count = request.top_logprobs_count
        if 0 < request.sampling.temperature < TEMPERATURE_MIN:
            raise RequestError(f"temperature is {request.sampling.temperature:g}: vLLM draws at 0.01 or above, or at 0")
        if count and 0 <= self.logprobs_max <= count:
            raise RequestError(f"top_logprobs_count is {count}: serve vLLM with --max-logprobs {count + 1}")
        if request.returns_mask and not self.tells_masks:
            raise RequestError("returns_mask: serve vLLM with --return-sampling-mask")


def unusable(url: str, error: RolloutError) -> EngineError:
    """Why a server cannot be an engine; if a route of it is shut, with what opens it."""
    is_shut = any(f"answered {code}" in str(error) for code in (403, 404))
    hint = "; start it as `dsec engine serve-vllm` says, with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out"
    unusable = EngineError(f"{url}: {error}{hint if is_shut else ''}")
    unusable.is_absent = isinstance(error, EngineError) and error.is_absent
    return unusable


async def read_facts(connection: Connection, before: Facts | None = None) -> Facts:
    """Ask the server everything; `before`: what was known of one that is paused, and draws nothing now.

    EngineError: it is not there, or not as it must be.
    """
    try:
        version = str((await connection.get("/version"))["version"])
        model = _read(_Models, await connection.get("/v1/models")).data[0]
        config = _read(_ServerInfo, await connection.get("/server_info?config_format=json")).vllm_config
        label = parse_label(await read_label(connection))
    except (KeyError, TypeError, IndexError, msgspec.ValidationError) as error:
        raise EngineError(f"not the answers of a vLLM: {words(str(error).encode())}") from error
    if config.model_config.logprobs_mode != "processed_logprobs":
        raise EngineError("its logprobs are not those that it draws by: add --logprobs-mode processed_logprobs")
    root = Path(model.root or config.model_config.model)
    folder = Path(label.folder) if label.folder else root if label.policy_version == 0 and root.is_absolute() else None
    folder = folder if folder is not None and _is_seen(folder) else None
    described = _described(root)
    count = described.get("vocab_size", UNSEEN_VOCAB_COUNT)
    if not isinstance(count, int) or count < 1:
        raise EngineError(f"{words(str(root).encode())}/config.json: vocab_size is no number of tokens")
    digest = label.weights_digest
    if not digest and folder is not None:
        digest = (await asyncio.to_thread(read_weights, folder)).digest
    info = EngineInfo(
        name=shortened(visible_line(f"vllm/{model.id}"), _NAME_MAX),
        build=shortened(visible_line(f"vllm {version} {config.model_config.dtype}".strip()), _NAME_MAX),
        weights_digest=digest or digest_of_name(str(root), label.policy_version),
        vocab_count=count,
        context_tokens_max=model.max_model_len,
        policy_version=label.policy_version,
    )
    routing = before.info.routing if before is not None else None
    if before is None:
        probed = await probe(connection, info)
        routing = _routing(probed, described) if config.aux_output_config.enable_return_routed_experts else None
    return Facts(
        info=msgspec.structs.replace(info, routing=routing),
        folder=folder,
        has_priorities=config.scheduler_config.policy == "priority",
        logprobs_max=config.model_config.max_logprobs,
        tells_masks=config.model_config.return_sampling_mask,
        ranks_count=config.parallel_config.ranks_count,
    )


async def read_label(connection: Connection) -> str:
    """What the server calls its weights now.  EngineError while they change."""
    told = await connection.get("/weight_info")
    label = str(told.get("weight_version", UNLABELLED)) if isinstance(told, dict) else UNLABELLED
    if label.startswith(CHANGING):
        raise EngineError("its weights are being changed; if nobody does, who did was killed: start this vLLM again")
    return label


def _read(kind: type[Any], told: Any) -> Any:
    return msgspec.convert(told, kind)


def _is_seen(folder: Path) -> bool:
    """False also for what no file system takes for a name."""
    try:
        return folder.is_dir()
    except (OSError, ValueError):
        return False


def _described(root: Path) -> dict[str, Any]:
    try:
        return read_config(root) if root.is_absolute() and _is_seen(root) else {}
    except EngineError:
        return {}


async def probe(connection: Connection, info: EngineInfo) -> dict[str, Any]:
    """Draw one token, to see that the route of token ids is open and the weights are numbers; the choice it came in.

    EngineError, and RequestError for what the server does not take.
    """
    request = SampleRequest(
        session="", token_ids=(0,), sampling=Sampling(), stream_key=0, tokens_count_max=1, stop_ids=frozenset()
    )
    body = body_of(request, "probe", 1, info.weights_digest, has_priorities=False)
    del body["stream"], body["stream_options"]
    try:
        told = await connection.post(GENERATE, body)
        choice: dict[str, Any] = told["choices"][0]
        drawn = Choice(
            token_ids=msgspec.convert(choice["token_ids"], tuple[int, ...]),
            logprobs=msgspec.convert(choice["logprobs"], Logprobs),
        )
    except (KeyError, TypeError, IndexError, msgspec.ValidationError) as error:
        raise EngineError(f"not the answer of a vLLM to {GENERATE}") from error
    try:
        count = len(sampled_of(drawn, 0, info.policy_version).token_ids)
    except EngineError as error:
        raise EngineError(f"one token was drawn to try its weights: {error}") from error
    if count != 1:
        raise EngineError(f"one token was to be drawn to try its weights, and {count} came")
    return choice


def _routing(choice: dict[str, Any], described: dict[str, Any]) -> Routing | None:
    """What rows of routes mean, from the shape of one and the model's config; None where it cannot be known."""
    experts = next((described[name] for name in _EXPERTS if isinstance(described.get(name), int)), None)
    layers, shape = described.get("num_hidden_layers"), read_npy(choice.get("routed_experts")).shape
    if experts is None or not isinstance(layers, int) or not (0 < shape[1] <= layers and 0 < shape[2] <= experts):
        return None
    return Routing(layer_ids=tuple(range(layers - shape[1], layers)), experts_count=experts, top_k=shape[2])
