"""A vLLM server in processes of its own, and its wire in a page: what `vllm_gpu.py`, and others, measure with.

Plain HTTP rather than the adapter: it speaks to older releases, too, and times what a client sees.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from rollout.engines.vllm.launch import VLLM_VERSION, Preset, make_launch, tiny_preset
from rollout.engines.vllm.tiny import write_tiny_model

START_S_MAX = 420.0
SIZES = {"tiny": (1, 2), "30m": (8, 8), "160m": (16, 12)}
"""Of a model of random weights: how many times the tiny one's width, and its layers."""


@dataclass
class Answer:
    """Of one request: its tokens, when the first of them came, what was cached, and the experts' .npy."""

    tokens: list[int] = field(default_factory=list)
    first_s: float = 0.0
    cached: int = 0
    routes: np.ndarray[Any, Any] | None = None


@dataclass
class Setup:
    """What all servers share."""

    python: str
    port: int
    logs: Path
    scratch: Path
    version: str


class Server:
    """A vLLM in processes of its own, until `kill` or the end of the `with`."""

    def __init__(self, setup: Setup, preset: Preset, name: str, *more: str, **how: Any) -> None:
        self.setup, self.log = setup, setup.logs / f"{name}.log"
        launch = make_launch(preset, port=setup.port, python=setup.python, more=more, **{"device": "cuda"} | how)
        # before 0.32 the route of token ids is always there, and its flag unknown
        old = tuple(int(part) for part in setup.version.split(".")[:2]) < (0, 32)
        arguments = [one for one in launch.arguments if not (old and one == "--enable-scale-out")]
        begin = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                arguments, env=os.environ | launch.environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait(begin + START_S_MAX)
        except BaseException:
            self.kill()
            raise
        self.start_s = time.monotonic() - begin

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Kill -9, the processes of the engine included."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def post(self, path: str) -> None:
        """A control request; raises if it is refused."""
        connection = http.client.HTTPConnection("127.0.0.1", self.setup.port, timeout=60)
        connection.request("POST", path)
        response = connection.getresponse()
        assert response.status == 200, f"{path}: {response.status} {response.read(400)!r}"

    def ask(self, prompt: list[int], count: int, seed: int = 0, salt: str = "", **more: Any) -> Answer:
        """`count` tokens at temperature 1, all that the server says of them."""
        answer = Answer()
        for _ in self.stream(answer, prompt, count, seed, salt, **more):
            pass
        assert len(answer.tokens) == count, f"{len(answer.tokens)} of {count} tokens came"
        return answer

    def stream(
        self, answer: Answer, prompt: list[int], count: int, seed: int = 0, salt: str = "", **more: Any
    ) -> Iterator[int]:
        """Fill `answer`; yields how many tokens are there, after each event."""
        body: dict[str, Any] = {
            "token_ids": prompt,
            "sampling_params": {"max_tokens": count, "temperature": 1.0, "seed": seed, "ignore_eos": True},
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"cache_salt": salt} if salt else {}),
            **more,
        }
        begin = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.setup.port, timeout=240)
        connection.request("POST", "/inference/v1/generate", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, f"generate: {response.status} {response.read(400)!r}"
        for line in response:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, f"generate: {event['error']}"
            answer.cached = _cached(event) or answer.cached
            for choice in event.get("choices", ()):
                answer.first_s = answer.first_s or time.perf_counter() - begin
                answer.tokens += choice["token_ids"]
                if choice.get("routed_experts"):
                    answer.routes = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])))
                yield len(answer.tokens)

    def _wait(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"vLLM ended at its start:\n{last_error(self.log)}")
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", self.setup.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.25)
        raise RuntimeError(f"vLLM did not start in {START_S_MAX:.0f} s:\n{last_error(self.log)}")


@contextlib.contextmanager
def on_processors(python: str, size: str) -> Iterator[str]:
    """The URL of a server of that Python's vLLM, with a model of such a size, that computes on this host."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    scale, layers_count = SIZES[size]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        preset = tiny_preset(write_tiny_model(folder / "model", scale=scale, layers_count=layers_count))
        setup = Setup(python, port, folder, folder, VLLM_VERSION)
        with Server(setup, preset, "vllm", device="cpu", memory_gib=4) as server:
            server.ask([0], 1)  # the first step may take a minute
            yield f"http://127.0.0.1:{port}"


def _cached(event: dict[str, Any]) -> int:
    details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def last_error(log: Path) -> str:
    """The last lines that name an error, or simply the last ones."""
    lines = log.read_text(errors="replace").splitlines()
    named = [line for line in lines if "Error" in line and "WARNING" not in line]
    return "\n".join(dict.fromkeys(named[-6:] or lines[-6:]))
