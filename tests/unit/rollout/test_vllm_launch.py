"""What `dsec engine serve-vllm` prints; tests/external/vllm/ has a real vLLM parse and run it."""

import json
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rollout.cli import main
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT
from rollout.engines.vllm.tiny import CONFIG, write_tiny_model


def ask(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["engine", "serve-vllm", *arguments])


def launched(*arguments: str) -> tuple[dict[str, str], dict[str, str]]:
    """Environment and flags."""
    said = ask("--json", *arguments)
    assert said.exit_code == 0, said.output
    launch = json.loads(said.output)
    assert launch["arguments"][:3] == ["python3", "-m", "vllm.entrypoints.openai.api_server"]
    pairs = (flag.partition("=") for flag in launch["arguments"][3:])
    return launch["environment"], {name: value for name, _, value in pairs}


def test_what_is_printed_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    key = tmp_path / "a key"
    key.write_text("0123456789abcdef\n")
    spy = tmp_path / "python 3"
    spy.write_text('#!/bin/sh\nenv; printf "%s\\n" "$@"\n')
    spy.chmod(0o755)
    said = ask("v4-pro", "--offload", str(tmp_path / "k v"), "--api-key-file", str(key), "--python", str(spy))
    ran = subprocess.run(["sh", "-c", said.output], capture_output=True, text=True, check=True).stdout.splitlines()
    assert {"VLLM_API_KEY=0123456789abcdef", "VLLM_SERVER_DEV_MODE=1", "PYTHONHASHSEED=0"} <= set(ran)
    words = [word for word in shlex.split(said.output, comments=True) if word.strip()]
    assert ran[-len(words) + words.index("-m") :] == words[words.index("-m") :]
    assert "0123456789abcdef" not in said.output
    over_it = shlex.split(said.output.splitlines()[0].partition("over it: ")[2])
    assert over_it[0] == f"DSEC_ENGINE_KEY=$(cat '{key}')"
    assert over_it[1:5] == ["dsec", "serve", "--engine", "http://127.0.0.1:8000"]
    assert over_it[5:] == ["--tokenizer", "FOLDER-OF-DeepSeek-V4-Pro"]


def test_the_service_over_a_model_has_its_tokenizer(tmp_path: Path) -> None:
    own = write_tiny_model(tmp_path / "own")
    said = ask(str(own), "--json", "--port", "81", "--host", "::1")
    assert json.loads(said.output)["service"] == [
        "dsec",
        "serve",
        "--engine",
        "http://[::1]:81",
        "--tokenizer",
        str(own),
    ]


def test_the_models_have_what_they_need_and_all_have_what_the_adapter_needs(tmp_path: Path) -> None:
    own = write_tiny_model(tmp_path / "own")
    tiny = ("tiny", "--tiny-dir", str(tmp_path / "tiny"))
    for asked in (("v4-flash",), ("v4-pro",), tiny, (str(own),), (str(own), "--device", "cpu")):
        environment, flags = launched(*asked)
        assert {"--enable-scale-out", "--enable-prompt-tokens-details"} <= flags.keys()
        assert (flags["--logprobs-mode"], flags["--scheduling-policy"]) == ("processed_logprobs", "priority")
        assert (flags["--host"], flags["--port"]) == ("127.0.0.1", "8000")
        assert environment["VLLM_SERVER_DEV_MODE"] == "1"
        assert ("HF_HUB_OFFLINE" in environment) == (not asked[0].startswith("v4-"))
        assert ("VLLM_CPU_KVCACHE_SPACE" in environment) == (asked[0] == "tiny" or "cpu" in asked)
    assert launched("v4-flash")[1]["--data-parallel-size"] == "4"
    assert launched("v4-pro", "--gpus", "16")[1]["--data-parallel-size"] == "16"
    assert launched("v4-pro", "--context-tokens", "4096")[1]["--max-model-len"] == "4096"
    assert launched("v4-pro", "--routes", "--", "--port=9")[1]["--port"] == "9"


def test_each_version_of_the_weights_keeps_its_kv_in_a_folder_of_its_own() -> None:
    folders = []
    for version in ("0", "1"):
        _, flags = launched("v4-flash", "--offload", "/nvme/kv", "--weight-version", version, "--memory-gib", "3")
        extra = json.loads(flags["--kv-transfer-config"])["kv_connector_extra_config"]
        assert (extra["cpu_bytes_to_use"], extra["offload_prompt_only"]) == (3 << 30, False)
        folders.append(extra["secondary_tiers"][0]["root_dir"])
    assert folders == ["/nvme/kv/0", "/nvme/kv/1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gpt-5",), "none of v4-flash, v4-pro, tiny"),
        (("v4-flash", "--host", "0.0.0.0"), "needs --api-key-file"),
        (("v4-flash", "--offload", "/nvme/kv", "--device", "cpu"), "--offload needs a GPU"),
        (("v4-flash", "--masks", "--device", "cpu"), "--masks needs a GPU"),
        (("tiny", "--routes"), "--routes needs a GPU"),
        (("v4-flash", "--gpus", "2", "--device", "cpu"), "--gpus needs a GPU"),
        (("v4-flash", "--memory-gib", "3"), "--memory-gib bounds what --offload passes through"),
        (("v4-flash", "--offload", "/nvme/kv", "--weight-version", "../1"), "name of a directory"),
        (("v4-flash", "--api-key-file", "/no/such/key"), "cannot read the token"),
        (("v4-flash", "--json", "--run"), "--json prints what --run would become"),
        (("tiny", "--context-tokens", "2049"), "--context-tokens 2049: a context of tiny holds 2048 tokens"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(arguments: tuple[str, ...], said: str) -> None:
    result = ask(*arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.splitlines()) == 1


def test_what_is_for_vllm_stands_after_two_dashes() -> None:
    stray = ask("v4-flash", "extra")
    assert (stray.exit_code, "unexpected extra argument (extra)" in stray.output) == (2, True)
    assert "MODEL [-- FLAG ...]" in stray.output
    passed = json.loads(ask("v4-flash", "--json", "--", "extra", "--json", "--", "--port").output)
    assert passed["arguments"][-4:] == ["extra", "--json", "--", "--port"]


@pytest.mark.parametrize(("held", "said"), [("short", "holds 5 bytes, at least 16"), ("k\n" * 9, "printable ASCII")])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_key_that_serve_would_not_take_is_none_for_an_engine(tmp_path: Path, held: str, said: str, host: str) -> None:
    key = tmp_path / "key"
    key.write_text(held)
    result = ask("v4-flash", "--host", host, "--api-key-file", str(key))
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_who_lets_others_connect_is_warned_that_the_key_does_not_guard_everything(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("0123456789abcdef")
    result = ask("v4-flash", "--host", "0.0.0.0", "--api-key-file", str(key))
    assert result.exit_code == 0
    assert "can pause and change this engine, key or not" in result.stderr


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def test_a_port_that_another_has_is_refused_before_anything_starts(listener: socket.socket) -> None:
    port = str(listener.getsockname()[1])
    refused = ask("v4-flash", "--run", "--port", port, "--python", "/no/such/python")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr == f"dsec: vLLM cannot listen on 127.0.0.1, port {port}: Address already in use\n"
    elsewhere = ask("v4-flash", "--run", "--port", port, "--python", "/no/such/python", "--", "--port=1")
    assert (elsewhere.exit_code, elsewhere.stderr.splitlines()[-1]) == (
        2,
        "dsec: --python /no/such/python: No such file or directory",
    )


def test_a_host_that_is_none_of_this_machine_is_refused_and_a_free_port_is_not(
    listener: socket.socket, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("0123456789abcdef")
    away = ask("v4-flash", "--run", "--host", "192.0.2.1", "--api-key-file", str(key), "--python", "/no/such/python")
    assert (away.exit_code, "vLLM cannot listen on 192.0.2.1, port 8000: " in away.stderr) == (2, True)
    port = str(listener.getsockname()[1])
    listener.close()
    refused = ask("v4-flash", "--run", "--port", port, "--python", "/no/such/python")
    assert (refused.exit_code, refused.stderr.splitlines()[-1]) == (
        2,
        "dsec: --python /no/such/python: No such file or directory",
    )


def test_a_seed_gives_the_same_tiny_model_in_the_vocabulary_of_the_service(tmp_path: Path) -> None:
    one, same, other = (write_tiny_model(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (one, same, other)]
    assert weights[0] == weights[1] != weights[2]
    assert (one / "tokenizer.json").read_bytes() == (DEFAULT_CHECKPOINT / "tokenizer.json").read_bytes()


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kept", [("config.json", "model.safetensors"), ("config.json",), ("model.safetensors",)])
def test_no_other_model_is_overwritten(tmp_path: Path, kept: tuple[str, ...]) -> None:
    for name in kept:
        shutil.copyfile(DEFAULT_CHECKPOINT / name, tmp_path / name)
    before = bytes_of(tmp_path)
    refused = ask("tiny", "--tiny-dir", str(tmp_path))
    assert refused.exit_code == 2
    assert f"{tmp_path}/{kept[0]} is of another model, which would be overwritten" in refused.output
    assert bytes_of(tmp_path) == before


def test_weights_in_parts_are_no_tiny_model(tmp_path: Path) -> None:
    part = tmp_path / "model-00001-of-00002.safetensors"
    part.write_bytes(b"")
    assert f"{part} is of another model" in ask("tiny", "--tiny-dir", str(tmp_path)).output
    assert bytes_of(tmp_path) == {part.name: b""}


@pytest.mark.parametrize("more", [(), ("--run", "--python", "/no/such/python")])
def test_a_folder_with_anything_else_in_it_is_not_written_to(tmp_path: Path, more: tuple[str, ...]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused = ask("tiny", "--tiny-dir", str(tmp_path), *more)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert f"{tmp_path}/notes.txt is no file of this model: give a new or an empty folder" in refused.stderr
    assert bytes_of(tmp_path) == {"notes.txt": b"mine"}


def test_what_a_kill_left_of_a_tiny_model_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / ".tiny-half").mkdir()
    assert ask("tiny", "--tiny-dir", str(tmp_path)).exit_code == 0


def test_a_tiny_model_that_lies_there_is_used_or_made_whole(tmp_path: Path) -> None:
    whole = bytes_of(write_tiny_model(tmp_path / "tiny"))
    for missing in (None, "model.safetensors", "config.json", "tokenizer.json"):
        if missing is not None:
            (tmp_path / "tiny" / missing).unlink()
        assert ask("tiny", "--tiny-dir", str(tmp_path / "tiny")).exit_code == 0
        assert bytes_of(tmp_path / "tiny") == whole


def test_a_folder_that_cannot_be_written_to_is_told_in_a_line() -> None:
    refused = ask("tiny", "--tiny-dir", "/proc/no-folder")
    assert (refused.exit_code, refused.output.startswith("dsec: cannot write a model to /proc/")) == (2, True)


def test_the_tiny_model_can_be_wider_and_deeper(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, scale=2, layers_count=3)
    data = (folder / "model.safetensors").read_bytes()
    tensors = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (2 * CONFIG["hidden_size"], 3)
    assert tensors["model.layers.2.self_attn.q_proj.weight"]["shape"] == [
        config["num_attention_heads"] * config["head_dim"],
        config["hidden_size"],
    ]
    assert "model.layers.3.input_layernorm.weight" not in tensors


def test_the_tiny_model_with_experts_has_a_gate_and_that_many_of_them_in_each_layer(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, experts_count=3)
    data = (folder / "model.safetensors").read_bytes()
    tensors = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    gate, experts = "model.layers.1.mlp.gate.weight", [name for name in tensors if ".layers.1.mlp.experts." in name]
    assert tensors[gate]["shape"] == [3, CONFIG["hidden_size"]]
    assert len(experts) == 3 * 3
    assert json.loads((folder / "config.json").read_text())["num_experts"] == 3
