"""vLLM's own parser reads every command that `dsec engine serve-vllm` prints."""

import json
import subprocess
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from rollout.cli import main

PARSE = """
import json, os, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
for flags in json.load(sys.stdin):
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    validate_parsed_serve_args(args)
    engine = AsyncEngineArgs.from_cli_args(args)
    print(json.dumps({
        "model": engine.model, "name": args.served_model_name, "port": args.port, "host": args.host,
        "is_open": args.enable_scale_out, "ranks": engine.data_parallel_size, "context": engine.max_model_len,
        "logprobs": [engine.logprobs_mode, engine.max_logprobs], "policy": engine.scheduling_policy,
        "tokenizer": engine.tokenizer_mode, "block": engine.block_size, "dtype": engine.dtype,
        "routes": [engine.enable_return_routed_experts, engine.return_sampling_mask],
        "kv": vars(engine.kv_transfer_config) if engine.kv_transfer_config else None,
    }, default=str))
"""


def test_vllm_reads_every_flag_as_it_is_meant(vllm_python: Path, tmp_path: Path) -> None:
    asked = (
        ("v4-flash", "--offload", "/nvme/kv", "--weight-version", "7", "--routes", "--masks", "--host", "::1"),
        ("v4-pro", "--port", "8001", "--context-tokens", "65536"),
        ("tiny", "--tiny-dir", str(tmp_path / "tiny"), "--", "--model", "elsewhere"),
    )
    launches = [
        json.loads(CliRunner().invoke(main, ["engine", "serve-vllm", "--json", *each]).output) for each in asked
    ]
    told = subprocess.run(
        [vllm_python, "-c", PARSE],
        input=json.dumps([launch["arguments"][3:] for launch in launches]),
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TMPDIR": str(tmp_path), "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    flash, pro, tiny = (json.loads(line) for line in told.stdout.splitlines() if line.startswith("{"))
    common: dict[str, Any] = {"is_open": True, "logprobs": ["processed_logprobs", 33], "policy": "priority"}
    assert common.items() <= flash.items()
    assert common.items() <= pro.items()
    assert common.items() <= tiny.items()
    assert (flash["model"], flash["host"], flash["ranks"]) == ("deepseek-ai/DeepSeek-V4-Flash", "::1", 4)
    assert (flash["tokenizer"], flash["block"], flash["routes"]) == ("deepseek_v4", 256, [True, True])
    extra = flash["kv"]["kv_connector_extra_config"]
    assert (flash["kv"]["kv_connector"], flash["kv"]["kv_load_failure_policy"]) == ("OffloadingConnector", "recompute")
    assert extra["secondary_tiers"] == [{"type": "fs", "root_dir": "/nvme/kv/7"}]
    assert (pro["ranks"], pro["port"], pro["context"], pro["kv"]) == (8, 8001, 65536, None)
    assert (tiny["model"], tiny["name"], tiny["dtype"], tiny["context"]) == ("elsewhere", ["tiny"], "float32", 2048)
