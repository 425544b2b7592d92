"""`rivulet` as people run it: real processes, their screens, signals and exit statuses."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from checkpoints import byte_tokenizer, make_gguf, make_llama
from processes import RIVULET, Serving, environment, gone
from safetensors.torch import load_file, save_file
from wire import wait_for

from server.config import BenchSettings, GenerateSettings, ModelSettings, ServeSettings


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [RIVULET, *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_serve_from_start_to_end(tiny_folder: Path) -> None:
    with Serving("--model", tiny_folder, "--port", "0") as server:
        screen = server.screen
        assert server.url.startswith("http://127.0.0.1:")
        assert f"{tiny_folder.name} on {server.url}" in screen
        chosen = r"(native .* kernels.*; guesses by prompt-lookup|torch ops)"
        assert re.search(rf"runs on +CPU, \d+ threads?, {chosen}", screen)
        assert re.search(r"memory +KV cache: [\d,]+ tokens", screen)
        phases = ("import torch", "find the model", "read its files", "load the weights", "make the KV cache")
        for phase in phases:
            assert re.search(rf"{phase} \d+\.\d s", screen), screen
        assert re.search(r"\d+\.\d s in all", screen)
        assert "\x1b" not in screen, "colours in a file"

        # What it says can be pasted.
        lines = [line.partition("curl")[2] for line in screen.splitlines() if " curl " in line]
        commands = [shlex.split(line) for line in lines]
        assert len(commands) == 2
        for command in commands:
            (address,) = (word for word in command if word.startswith("http"))
            header, body = command[command.index("-H") + 1], command[command.index("-d") + 1]
            assert header == "Content-Type: application/json"
            name, _, value = header.partition(": ")
            wait_for(lambda: reachable(server.url))
            answer = httpx.post(address, headers={name: value}, content=body, timeout=60)
            assert answer.status_code == 200
            assert ("-N" in command) == answer.headers["content-type"].startswith("text/event-stream")

        # One port, on this machine alone.
        (address,) = server.listening()
        host, _, port = address.partition(":")
        assert host == "0100007F"
        assert int(port, 16) == int(server.url.rpartition(":")[2])

        # A stream that runs when the signal comes still ends by itself.
        body = {"inputs": "last", "parameters": {"max_new_tokens": 450, "ignore_eos": True}}
        with (
            httpx.Client(base_url=server.url) as idle,
            httpx.stream("POST", f"{server.url}/generate_stream", json=body, timeout=60) as answer,
        ):
            assert idle.get("/ready").status_code == 200
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            *_, last = [line for line in lines if line]
            ended = time.monotonic()
            assert json.loads(last.removeprefix("data: "))["generated_text"]
            assert server.end() == 0
            assert time.monotonic() - ended < 15, "a connection that rests holds it up"
        wait_for(lambda: gone(server.process.pid))
        assert not reachable(server.url)
        assert "Traceback" not in server.screen
        more = server.screen.removeprefix(screen).splitlines()
        assert all(" rivulet.access: " in line for line in more), "it says something while it ends"


def reachable(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.ConnectError:
        return False


def test_flags_win_over_variables(tiny_folder: Path) -> None:
    variables = {
        "RIVULET_MODEL": str(tiny_folder),
        "RIVULET_PORT": "1",  # nobody may listen there, or only root
        "RIVULET_SERVED_MODEL_NAME": "from-the-environment",
        "RIVULET_MAX_MODEL_LEN": "64",
        "RIVULET_DTYPE": "float32",
        "RIVULET_KV_CACHE_TOKENS": "256",
        "RIVULET_LOG_FORMAT": "json",
    }
    flags = ("--port", "0", "--served-model-name=from-the-flag", "--log-level", "debug")
    with Serving(*flags, **variables) as server:
        wait_for(lambda: reachable(server.url))
        info = httpx.get(f"{server.url}/info").json()
        assert info["model_id"] == "from-the-flag"
        assert info["max_total_tokens"] == 64
        assert info["model_dtype"] == "float32"
        assert info["kv_cache_tokens"] == 256
        body = {"inputs": "a", "parameters": {"max_new_tokens": 1}, "forged\nline": 1}
        httpx.post(f"{server.url}/generate", json=body)
        server.process.send_signal(signal.SIGINT)
        assert server.end() == 130
        logged = [json.loads(line) for line in server.screen.splitlines() if line.startswith("{")]
        assert any("forged\\nline" in entry["message"] for entry in logged)
        assert all({"time", "level", "logger", "message"} <= entry.keys() for entry in logged)
        assert "Traceback" not in server.screen


def test_a_signal_while_it_starts(tiny_folder: Path) -> None:
    arguments = [RIVULET, "serve", "--model", tiny_folder, "--port", "0"]
    process = subprocess.Popen(
        arguments, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    time.sleep(1.2)  # it imports torch
    process.send_signal(signal.SIGTERM)
    _, screen = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in screen
    assert gone(process.pid)


def test_generate_streams_to_standard_output(script_folder: Path) -> None:
    done = run("generate", "9", "--model", script_folder, "--raw")
    assert done.returncode == 0
    assert done.stdout == "\nA😎é漢. BCD\n"
    assert re.search(r"1 tokens? in, 17 out; first after \d+\.\d+ s, then \d+ tokens/s", done.stderr)


def test_generate_shows_each_token_as_it_comes(tiny_folder: Path) -> None:
    """Several tries: a text of this model may be over before a busy machine lets us read its beginning."""
    arguments = [RIVULET, "generate", "slow", "--model", tiny_folder, "--max-tokens", "480", "--raw"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    pieces = []
    for _ in range(10):
        with subprocess.Popen(arguments, env=environment(), **pipes) as process:
            assert process.stdout is not None
            pieces.append((os.read(process.stdout.fileno(), 100_000), process.stdout.read()))
            assert process.wait(60) == 0
        first, rest = pieces[-1]
        if 0 < len(first) < len(rest):
            return
    raise AssertionError(pieces)


def test_the_real_model_from_the_terminal(smollm2_path: Path) -> None:
    question = "Name the largest ocean on Earth."
    done = run("generate", question, "--model", smollm2_path, "--max-tokens", "16")
    assert done.returncode == 0
    assert "Pacific Ocean" in done.stdout
    assert done.stdout.endswith(".\n")
    assert "37 tokens in" in done.stderr


# Help


UNITS = {
    "threads": "threads",
    "kv_cache_tokens": "tokens",
    "kv_cache_memory": "bytes",
    "max_model_len": "tokens",
    "max_running": "requests",
    "token_budget": "tokens",
    "port": "TCP port",
    "max_waiting": "requests",
    "max_tokens": "tokens",
}


@pytest.mark.alone
@pytest.mark.parametrize(
    ("command", "settings"),
    [("serve", ServeSettings), ("generate", GenerateSettings), ("bench", BenchSettings)],
    ids=["serve", "generate", "bench"],
)
def test_help_shows_every_setting_with_its_unit(command: str, settings: type[ModelSettings]) -> None:
    started = time.perf_counter()
    done = run(command, "--help")
    assert time.perf_counter() - started < 3, "help should not wait for torch"
    assert done.returncode == 0
    assert done.stderr == ""
    text = " ".join(done.stdout.split())
    for name, field in settings.model_fields.items():
        flag = "TEXT" if name == "text" else f"--{name.replace('_', '-')}"
        assert f"{flag} " in text or f"{flag}," in text, name
        assert field.description, name
        assert field.description in text
        if name in UNITS:
            assert UNITS[name] in field.description
        if field.default is not None and name != "text":
            assert f"(default: {field.default})" in text, name


def test_help_of_the_command_itself() -> None:
    for arguments in (("--help",), ("-h",)):
        done = run(*arguments)
        assert done.returncode == 0
        assert "serve" in done.stdout
        assert "generate" in done.stdout
        assert "RIVULET_" in done.stdout
    module = subprocess.run(
        [sys.executable, "-m", "server", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert module.stdout == done.stdout


# Wrong calls


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["serve", "--no-such-flag"], "--no-such-flag"),
        (["serve", "--prot", "3"], "--prot"),
        (["serve", "extra"], "extra"),
        (["serve", "--port"], "port"),
        (["serve", "--port", "abc"], "port"),
        (["serve", "--port", "70000"], "port"),
        (["serve", "--port", "-1"], "port"),
        (["serve", "--device", "tpu"], "device"),
        (["serve", "--threads", "0"], "threads"),
        (["serve", "--kv-cache-memory", "much"], "kv_cache_memory"),
        (["serve", "--kv-cache-tokens", "5", "--kv-cache-memory", "5"], "not both"),
        (["serve", "--token-budget", "4"], "token_budget"),
        (["serve", "--max-running", "1.5"], "max_running"),
        (["generate"], "TEXT"),
        (["generate", "a", "--temperature", "nan"], "temperature"),
        (["generate", "a", "--max-tokens", "0"], "max_tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_call_is_told_in_one_line(arguments: list[str], text: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"rivulet {arguments[0]}: ")
    assert text in line


def test_a_wrong_variable_is_told_in_one_line() -> None:
    done = run("serve", RIVULET_PORT="many")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("rivulet serve: port: ")


def test_no_command_and_a_wrong_one() -> None:
    none, wrong = run(), run("frobnicate")
    assert (none.returncode, wrong.returncode) == (2, 2)
    assert "usage: rivulet" in none.stdout + none.stderr
    assert wrong.stderr.startswith("rivulet: there is no command 'frobnicate'")


# What cannot be served


def truncated(folder: Path) -> Path:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


def without_a_tensor(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def of_another_architecture(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def without_a_tokenizer(folder: Path) -> Path:
    (folder / "tokenizer.json").unlink()
    return folder


def without_a_config(folder: Path) -> Path:
    (folder / "config.json").unlink()
    return folder


def pickled(folder: Path) -> Path:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def truncated_gguf(folder: Path) -> Path:
    path = folder / "model.gguf"
    make_gguf(make_llama(folder / "source", tie=True), path)
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def with_code(folder: Path) -> Path:
    """The folder names code of its own, which would leave a file behind."""
    (folder / "modeling_x.py").write_text(f"open({str(folder / 'it-ran')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.X"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "model"
    byte_tokenizer(folder)
    make_llama(folder, tie=True)
    return folder


BROKEN: dict[Callable[[Path], Path], tuple[str, ...]] = {
    truncated: ("model.safetensors", "truncated"),
    without_a_tensor: ("without_a_tensor", "layers.1.mlp.up"),
    of_another_architecture: ("config.json", "mamba"),
}
"""What was done to a model -> what its sentence must name."""


def test_a_model_that_cannot_be_served_is_told_in_one_sentence(good_folder: Path) -> None:
    def attempt(damage: Callable[[Path], Path]) -> subprocess.CompletedProcess[str]:
        model = damage(Path(shutil.copytree(good_folder, good_folder.parent / damage.__name__)))
        return run("serve", "--port", "0", "--model", model)

    with ThreadPoolExecutor(2) as pool:
        for done, words in zip(pool.map(attempt, BROKEN), BROKEN.values(), strict=True):
            assert done.returncode == 1, done.stderr
            one_sentence(done.stdout, done.stderr, *words)


def one_sentence(stdout: str, stderr: str, *words: str) -> None:
    """All that is told is one line with these words."""
    assert stdout.strip() == ""
    (line,) = stderr.strip().splitlines()
    assert line.startswith("rivulet: ")
    for word in words:
        assert word in line


MANY = """
import contextlib, io, json, sys, traceback
from server.cli import main
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(arguments)
        except BaseException:
            status = traceback.format_exc()
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""
"""Runs several commands in one process, which has to import torch only once."""


def test_more_that_cannot_be_served(good_folder: Path) -> None:
    damages = (without_a_tokenizer, without_a_config, pickled, truncated_gguf, with_code)
    models = {
        damage: str(damage(Path(shutil.copytree(good_folder, good_folder.parent / damage.__name__))))
        for damage in damages
    }
    good = str(good_folder)
    cases: list[tuple[list[str], tuple[str, ...]]] = [
        (["serve", "--port", "0", "--model", models[without_a_tokenizer]], ("tokenizer.json",)),
        (["serve", "--port", "0", "--model", models[without_a_config]], ("config.json",)),
        (["generate", "hi", "--model", models[pickled]], ("safetensors",)),
        (["generate", "hi", "--model", models[truncated_gguf]], ("model.gguf", "truncated")),
        (["serve", "--port", "0", "--model", "/no/such/folder"], ("/no/such/folder",)),
        (["serve", "--port", "0", "--model", good, "--max-model-len", "4096"], ("4096", "512")),
        (["generate", "", "--raw", "--model", good], ("no tokens",)),
        (["generate", "x" * 600, "--raw", "--model", good], ("600", "512")),
        (["generate", "\udcff", "--raw", "--model", good], ("lone surrogate",)),
    ]
    code_runs_not = ["generate", "hi", "--model", models[with_code], "--max-tokens", "1"]
    calls = json.dumps([arguments for arguments, _ in cases] + [code_runs_not])
    done = subprocess.run(
        [sys.executable, "-c", MANY, calls],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    *refused, served = (json.loads(line) for line in done.stdout.splitlines())
    for (status, stdout, stderr), (_, words) in zip(refused, cases, strict=True):
        assert status == 1, status
        one_sentence(stdout, stderr, *words)
    assert served[0] == 0, "a folder is data: what is beside the weights does not matter"
    assert not (Path(models[with_code]) / "it-ran").exists()


@pytest.mark.alone
def test_a_port_that_is_taken(tiny_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        started = time.perf_counter()
        done = run("serve", "--model", tiny_folder, "--port", str(port))
        assert time.perf_counter() - started < 3, "it should not load the model first"
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"rivulet: cannot listen on 127.0.0.1:{port}: ")
    done = run("serve", "--model", tiny_folder, "--host", "no.such.host.invalid")
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()  # the first one warns that there is no key
    assert line.startswith("rivulet: cannot listen on no.such.host.invalid:")
