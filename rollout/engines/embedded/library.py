"""The compiled engine: its functions, and the structures of `v4.h` as ctypes has them.

The field order here is the order there; nothing else knows it.

See: `v4.h`.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from rollout.engine import STOP_IDS_MAX
from rollout.engines.embedded.config import LAYERS_MAX
from rollout.engines.embedded.rope import PAIRS_MAX
from rollout.errors import EngineError

LIBRARY = Path(__file__).parent / "v4.so"


class CConfig(ctypes.Structure):
    """`v4_config`."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                "vocab_count",
                "hidden_dim",
                "streams_count",
                "layers_count",
                "heads_count",
                "head_dim",
                "rope_dim_main",
                "rope_dim_compress",
                "query_rank",
                "output_groups",
                "output_rank",
                "window_tokens",
                "index_heads",
                "index_dim",
                "index_topk",
                "csa_rate",
                "hca_rate",
                "experts_count",
                "experts_active",
                "expert_dim",
                "scoring",
                "sinkhorn_rounds",
                "context_tokens_max",
                "batch_tokens_max",
            )
        ),
        *(
            (name, ctypes.c_float)
            for name in (
                "norm_eps",
                "mix_eps",
                "swiglu_limit",
                "route_scale",
                "rope_scale_main",
                "rope_scale_compress",
            )
        ),
        ("frequencies_main", ctypes.c_float * PAIRS_MAX),
        ("frequencies_compress", ctypes.c_float * PAIRS_MAX),
        ("attention_kinds", ctypes.c_int32 * LAYERS_MAX),
        ("hash_routed", ctypes.c_int32 * LAYERS_MAX),
    )


class CSampling(ctypes.Structure):
    """`v4_sampling`."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("stream_key", ctypes.c_uint64),
        ("temperature", ctypes.c_double),
        ("top_p", ctypes.c_double),
        ("top_k", ctypes.c_int32),
    )


class CChunk(ctypes.Structure):
    """`v4_chunk`."""

    _fields_ = (
        ("state", ctypes.c_void_p),
        ("token_ids", ctypes.POINTER(ctypes.c_uint32)),
        ("logits", ctypes.POINTER(ctypes.c_float)),
        ("tokens_count", ctypes.c_int32),
        ("logits_count", ctypes.c_int32),
        ("routes", ctypes.POINTER(ctypes.c_uint8)),
    )


class CReport(ctypes.Structure):
    """`v4_report`."""

    _fields_ = (
        ("top_ids", ctypes.POINTER(ctypes.c_uint32)),
        ("mask_ids", ctypes.POINTER(ctypes.c_uint32)),
        ("top_logprobs", ctypes.POINTER(ctypes.c_float)),
        ("top_count", ctypes.c_int32),
        ("mask_count", ctypes.c_int32),
        ("routes", ctypes.POINTER(ctypes.c_uint8)),
        ("hidden", ctypes.POINTER(ctypes.c_uint16)),
    )


class CStream(ctypes.Structure):
    """`v4_stream`."""

    _fields_ = (
        ("state", ctypes.c_void_p),
        ("sampling", CSampling),
        ("token_id", ctypes.c_uint32),
        ("rounds_max", ctypes.c_int32),
        ("drawn_count", ctypes.c_int32),
        ("stops_count", ctypes.c_int32),
        ("stop_ids", ctypes.c_uint32 * STOP_IDS_MAX),
    )


@functools.cache
def load_library(path: Path = LIBRARY, cpuinfo: Path = Path("/proc/cpuinfo")) -> ctypes.CDLL:
    """The compiled engine.  EngineError if it is not built, or if this processor cannot run it."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise EngineError(
            f"{path}: the decode engine is not built ({error}); run: python setup.py build_ext"
        ) from error
    _check_processor(library, path, cpuinfo)
    pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32
    reports = ctypes.POINTER(CReport)
    for name, result, arguments in (
        ("v4_build", ctypes.c_char_p, ()),
        ("v4_is_finite", integer, (pointer, size)),
        ("v4_create", pointer, (ctypes.POINTER(CConfig), ctypes.POINTER(pointer), integer)),
        ("v4_destroy", None, (pointer,)),
        ("v4_state_create", pointer, (pointer,)),
        ("v4_state_destroy", None, (pointer,)),
        ("v4_state_reset", None, (pointer, pointer)),
        ("v4_state_position", ctypes.c_uint32, (pointer,)),
        ("v4_packed_bytes", size, (pointer, ctypes.c_uint32)),
        ("v4_state_pack", None, (pointer, pointer, pointer)),
        ("v4_state_unpack", integer, (pointer, pointer, pointer, size)),
        ("v4_step", None, (pointer, ctypes.POINTER(CChunk), integer)),
        (
            "v4_sample",
            ctypes.c_uint32,
            (pointer, pointer, ctypes.POINTER(CSampling), ctypes.c_uint32, pointer, reports),
        ),
        ("v4_score", None, (pointer, pointer, pointer, integer, pointer, reports)),
        ("v4_decode", None, (pointer, ctypes.POINTER(CStream), integer, pointer, pointer, reports)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _check_processor(library: ctypes.CDLL, path: Path, cpuinfo: Path) -> None:
    """Without this a processor that lacks an instruction ends the whole process with SIGILL."""
    wanted = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, "v4_processor_flags"))).decode().split()
    try:
        text = cpuinfo.read_text()
    except OSError:  # no Linux, or no /proc: the build's own machine, most likely
        return
    lines = [line.partition(":")[2].split() for line in text.splitlines() if line.startswith("flags")]
    missing = [flag for flag in wanted if lines and flag not in lines[0]]
    if missing:
        raise EngineError(
            f"{path}: was built for x86-64-v3 and this processor lacks {', '.join(missing)}: run on one of 2015 or "
            "later (a virtual machine may hide what its host has: give it the host's processor type)"
        )


def build_digest() -> str:
    """What the library was built from: a digest of sources and flags, compiled in."""
    return str(load_library().v4_build().decode("ascii"))
