"""`dsec serve` over a vLLM that comes late, goes and comes back: who asks for its health is told."""

import asyncio
import re
import socket
from pathlib import Path
from typing import Any

import grpc
import httpx2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rollout.engines.vllm.testing import CONTEXT_TOKENS_MAX, WireDouble, write_checkpoint
from rollout.main import load_tokenizer

SERVICE = "rollout.pb.v1.RolloutService"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_service_waits_for_its_engine_and_says_when_it_is_away(dsec: Any, tmp_path: Path) -> None:
    engine = WireDouble(write_checkpoint(tmp_path / "weights", 0, load_tokenizer().vocab_count))
    kept = socket.socket()  # the port, from all others, while the engine is away
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    engine.port = kept.getsockname()[1]
    places = ("--out", tmp_path / "run", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--engine", engine.url)
    process = dsec.start("serve", *places, env={"DSEC_CONTEXT_TOKENS_COUNT_MAX": str(CONTEXT_TOKENS_MAX)})
    try:
        waiting = await asyncio.to_thread(process.stderr.readline)
        said = rf"no engine is there yet, asked again for 3\d+ s: {engine.url}: nobody answers there"
        assert re.match(rf"20[-\d]+ [:,\d]+ WARNING .*{said}", waiting)
        await engine.start()
        _, _, address, _, http, *_ = (await asyncio.to_thread(process.stdout.readline)).split()
        async with (
            grpc.aio.insecure_channel(address) as channel,
            httpx2.AsyncClient(base_url=http.rstrip(","), timeout=300) as client,
        ):
            health = health_pb2_grpc.HealthStub(channel)
            told = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=300)
            assert (await told.read()).status == SERVING
            assert (await client.get("/health")).status_code == 200
            await engine.stop()
            asking = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}))
            assert (await told.read()).status == NOT_SERVING
            away = await client.get("/health")
            assert away.status_code == 503
            assert f"nothing can be drawn: {engine.url}: " in away.json()["error"]["message"]
            assert (await client.get("/live")).status_code == 200
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
            await engine.start()
            assert (await told.read()).status == SERVING
            assert (await asking).status_code == 200
            told.cancel()
    finally:
        process.terminate()
        await asyncio.to_thread(process.communicate, timeout=60)
        await engine.stop()
        kept.close()
