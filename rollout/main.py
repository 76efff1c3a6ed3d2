"""Composition: which engine, substrate and tokenizer a service on this host is made of."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path

import wal
from dsec.address import parse_address
from dsec.edge.clock import HostClock
from dsec.sandbox import Substrate
from rollout.config import RolloutConfig, misspelt
from rollout.engine import Engine
from rollout.engines.embedded.batching import Limits
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT, read_vocabulary
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.environment.edge import RunEdge, substrate_config
from rollout.errors import JournalError, RequestError
from rollout.service import RolloutService
from toolcall_dsl import V4, Tokenizer

_log = logging.getLogger(__name__)
EDGE = "edge"
STATES = "states"


def load_tokenizer(folder: Path | None = None) -> Tokenizer:
    """The tokenizer of a model's folder, of DSEC_TOKENIZER, or of the embedded checkpoint.

    TokenizerError names the file, and the control tokens of prompts that it lacks.
    """
    path = (folder or RolloutConfig().tokenizer or DEFAULT_CHECKPOINT) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(path)
    tokenizer.require(V4.control_tokens)
    return tokenizer


def holds_edge(directory: Path) -> bool:
    """Whether a run there was killed before its own Edge had ended in order."""
    return (directory / EDGE).exists()


def make_service(directory: Path, config: RolloutConfig, edge_url: str = "") -> RolloutService:
    """A service over `directory` with the engine of `make_engine` and the Edge of `make_substrate`.  Not open yet."""
    substrate, tokenizer = make_substrate(directory, config, edge_url), load_tokenizer(config.tokenizer)
    return RolloutService(directory, make_engine(config), substrate, tokenizer, config)


def make_engine(config: RolloutConfig, cache: Path | None = None) -> Engine:
    """The servers that the config names, as one; without any the embedded engine.

    RequestError: no such URL can be, or the embedded engine's tokens mean something else to the config's tokenizer.
    States of the embedded engine's contexts lie where the config says, or else in `cache`, if anywhere.  Variables of
    the environment that are nearly knobs are told of here, where every service begins.
    """
    for variable, knob in misspelt(os.environ).items():
        _log.warning("nobody reads the environment variable %s: was %s meant?", variable, knob)
    if config.engines:
        from rollout.engines.pool import EnginePool
        from rollout.engines.vllm.engine import VllmEngine  # loads an HTTP client, which the embedded engine needs not

        if len(set(config.engines)) < len(config.engines):
            raise RequestError(f"--engine: the same server twice: {', '.join(config.engines)}")
        key = config.engine_key.get_secret_value()
        engines = {url: VllmEngine(url, key=key) for url in config.engines}
        silence_s = config.engine_silence_s / 2  # before who waits for the pool loses patience
        return EnginePool(engines, silence_s, config.engine_start_s)
    if config.tokenizer is not None:
        _check_ids(config.tokenizer)
    limits = Limits(cache_bytes_max=config.engine_cache_bytes_max, threads_count=config.engine_threads_count)
    folder = config.engine_cache or cache
    return EmbeddedEngine(limits=limits, cache=folder if limits.cache_bytes_max else None)


def _check_ids(folder: Path) -> None:
    """RequestError unless the tokenizer there has the ids that the embedded checkpoint was taught."""
    given, taught = (read_vocabulary(each / "tokenizer.json") for each in (folder, DEFAULT_CHECKPOINT))
    if given != taught:
        raise RequestError(
            f"{folder / 'tokenizer.json'} is another model's: its ids are not those of the embedded checkpoint, which "
            "draws without --engine.  Give --engine with the URL of its model, or no --tokenizer (DSEC_TOKENIZER)"
        )


def make_substrate(directory: Path, config: RolloutConfig, edge_url: str, number: int = 0) -> Substrate:
    """The sandboxes of a log: at the Edge of `edge_url`, or in one of this process, the directory's first or another.

    In an Edge of its own every rollout that runs can have a sandbox: RequestError if this process may not hold so
    many.  InvalidArgumentError for a url that cannot be.
    """
    if not edge_url:
        sandboxes_count = config.sandboxes_count_max + config.sandboxes_asleep_count_max
        return RunEdge(directory / (f"{EDGE}.{number}" if number else EDGE), substrate_config(sandboxes_count))
    from dsec.client.leased import LeasedSubstrate  # gRPC, which a run with an Edge of its own does not need

    parse_address(edge_url)
    return LeasedSubstrate(edge_url, partial(sandbox_labels, directory / "wal"), config.lease_ttl_s)


def sandbox_labels(log: Path) -> dict[str, str]:
    """What the sandboxes of an open log are found by: `run`, its id, and `log`, the one directory that it is in.

    A copy of a run has its id and all that it ever wrote, but not that directory: it is on this boot of this host, and
    its inode is taken for as long as it is there.
    """
    reader = wal.Reader(log)
    next(iter(reader), None)
    if reader.header is None:
        raise JournalError(f"{log} has no header yet")
    here = log.stat()
    return {"run": reader.header.log_id.hex(), "log": f"{HostClock().boot_id}/{here.st_dev:x}/{here.st_ino:x}"}
