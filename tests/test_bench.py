"""`rivulet bench` and bench/compare.py: counts, times, the plot, and how they fail."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest
from live import LiveServer

from server.bench_load import TGI, Answer, BenchError, Load, OpenAI, Prompts, calibrate, find_dialect, run
from server.bench_report import percentile, plot, summarize
from server.config import BenchSettings, InvalidSettings, parse_settings

ROOT = Path(__file__).resolve().parents[1]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("RIVULET_")}


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server", "bench", *arguments],
        cwd=ROOT,
        env=CLEAN,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("api", ["openai", "tgi", "auto"])
def test_a_load_is_counted(tiny_server: LiveServer, tmp_path: Path, api: str) -> None:
    svg = tmp_path / "plot.svg"
    size = ("--clients", "2", "--requests", "5", "--prompt-tokens", "60", "--output-tokens", "9")
    done = bench("--url", tiny_server.url, "--api", api, *size, "--plot", svg)
    result = last_line(done)
    assert done.stderr == "", "progress is for a terminal"
    assert "time to first token" in done.stdout
    assert result["api"] == {"auto": "openai"}.get(api, api)
    assert result["model"] == (None if api == "tgi" else tiny_server.name)
    assert result["arguments"]["clients"] == 2 and result["arguments"]["output_tokens"] == 9
    assert result["requests"] == len(result["each"]) == 5
    assert result["output_tokens"] == 45
    assert all(one["output_tokens"] == 9 for one in result["each"])
    assert all(0 < one["ttft_ms"] < one["total_ms"] for one in result["each"])
    assert all(abs(one["prompt_tokens"] - 60) <= 3 for one in result["each"]), "calibrated, in bytes here"
    assert result["prompt_tokens"] == sum(one["prompt_tokens"] for one in result["each"])
    assert result["tokens_per_second"] == pytest.approx(45 / result["seconds"], rel=0.01)
    assert result["decode_tokens_per_second"] > 0
    assert result["ttft_ms"]["p50"] <= result["ttft_ms"]["p90"] <= result["ttft_ms"]["p99"]
    assert ElementTree.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    tiny_server.wait_until_idle()


@pytest.mark.parametrize("api", ["openai", "tgi", "auto"])
def test_nobody_answers(api: str) -> None:
    done = bench("--url", "http://127.0.0.1:9", "--api", api, "--requests", "1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "rivulet bench: no server answers at http://127.0.0.1:9\n"


def test_a_refusal_is_told_in_the_servers_words(tiny_server: LiveServer) -> None:
    for arguments, words in (
        (("--model", "another"), "404 Not Found: "),
        (("--prompt-tokens", "5000"), "400 Bad Request: "),
        (("--prompt-tokens", "5000", "--api", "tgi"), "422 Unprocessable "),
    ):
        done = bench("--url", tiny_server.url, *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"rivulet bench: the server answered {words}"), done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_plot_that_cannot_be_written_and_a_timeout(tiny_server: LiveServer, tmp_path: Path) -> None:
    done = bench("--url", tiny_server.url, "--requests", "1", "--plot", tmp_path / "none" / "x.svg")
    assert done.returncode == 1
    assert "cannot write" in done.stderr and len(done.stderr.splitlines()) == 1
    started = time.monotonic()
    done = bench("--url", tiny_server.url, "--requests", "100000", "--timeout", "1")
    assert time.monotonic() - started < 30
    assert done.returncode == 1
    assert "of 100000 requests were answered within --timeout 1 seconds" in done.stderr
    tiny_server.wait_until_idle()


def test_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RIVULET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RIVULET_MODEL", "what is served, not what is measured")
    monkeypatch.setenv("RIVULET_BENCH_CLIENTS", "3")

    def parse(*arguments: str) -> BenchSettings:
        return parse_settings(BenchSettings, arguments, "rivulet bench")

    settings = parse("--url", "http://host:1/v1/", "--timeout", "2.5")
    assert (settings.url, settings.clients, settings.timeout) == ("http://host:1", 3, 2.5)
    assert (settings.model, settings.api, settings.plot) == (None, "auto", None)
    assert parse("--clients", "4").clients == 4, "the flag wins"
    for wrong, named in (
        (["--url", "host:1"], "url: begins with http"),
        (["--clients", "0"], "clients: "),
        (["--requests", "0"], "requests: "),
        (["--timeout", "inf"], "timeout: "),
        (["--api", "grpc"], "api"),
    ):
        with pytest.raises(InvalidSettings, match=named):
            parse(*wrong)


def answer(started: float, *arrivals: float, tokens: int) -> Answer:
    return Answer(started, arrivals, arrivals[-1], 7, tokens)


def test_figures_by_hand() -> None:
    figures = summarize([answer(10, 10.5, 11, 12.5, tokens=5), answer(11, 12, 12.25, 13, tokens=3)])
    assert figures["seconds"] == 3
    assert figures["tokens_per_second"] == pytest.approx(8 / 3, abs=0.01)
    assert figures["decode_tokens_per_second"] == 2, "4 tokens in 2 s, and 2 in 1 s"
    assert figures["ttft_ms"] == {"p50": 750, "p90": 950, "p99": 995, "max": 1000}
    assert figures["gap_ms"]["max"] == 1500
    assert figures["each"][0]["total_ms"] == 2500
    assert percentile([3, 1, 2], 0.5) == 2


def test_figures_of_one_token() -> None:
    answers = [answer(0, 1, tokens=1)]
    figures = summarize(answers)
    assert figures["decode_tokens_per_second"] is None and figures["gap_ms"] is None
    assert ElementTree.fromstring(plot("a < b & c", answers)) is not None


def answering(handle: Callable[[httpx.Request], httpx.Response]) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.MockTransport(handle), base_url="http://test")


async def pieces_of(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def read(dialect: Any, *chunks: bytes) -> Answer:
    """What is made of a stream that comes in these pieces."""

    async def go() -> Answer:
        async with answering(lambda request: httpx.Response(200, content=pieces_of(*chunks))) as http:
            return (await run(http, dialect, Load(1, 1, 8, 8), Prompts(8), lambda done: None))[0]

    return asyncio.run(go())


def test_events_are_read_whatever_the_pieces() -> None:
    """Without usage tokens are events with text; lines may be cut anywhere and end in two ways."""
    text = b': hi\r\n\r\ndata: {"choices": [{"text": "a"}]}\r\n\r\ndata:{"choices": [{"text": "b"}]}\n\n'
    end = b'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\ndata: [DONE]\n\n'
    whole = text + end
    for size in (1, 7, len(whole)):
        got = read(OpenAI("m"), *(whole[at : at + size] for at in range(0, len(whole), size)))
        assert (got.output_tokens, got.prompt_tokens, len(got.arrivals)) == (2, None, 2)
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}\n\n'
    got = read(OpenAI("m"), text, end, usage)
    assert (got.output_tokens, got.prompt_tokens) == (3, 5)
    got = read(TGI(), b'data: {"token": {"text": ""}, "details": null}\n\n')
    assert (got.output_tokens, got.prompt_tokens) == (1, None)


@pytest.mark.parametrize(
    "chunk",
    [
        b"",
        b"data: {}\n\n",
        b"data: nonsense\n\n",
        b'data: {"error": {"message": "broken"}}\n\n',
        b"data: 1\n\n",
    ],
)
def test_a_stream_that_says_nothing_good(chunk: bytes) -> None:
    for dialect in (OpenAI("m"), TGI()):
        with pytest.raises(BenchError):
            read(dialect, chunk)


def test_a_server_that_refuses_what_openai_lacks() -> None:
    """`transformers serve` answers 422 to unknown fields; it is asked again without them."""
    bodies = []

    def handle(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "theirs"}]})
        bodies.append(json.loads(request.content))
        if "ignore_eos" in bodies[-1]:
            return httpx.Response(422, json={"detail": "Unexpected fields in the request: {'ignore_eos'}"})
        count = 3 + 2 * len(bodies[-1]["prompt"].split())
        usage = {"prompt_tokens": count, "completion_tokens": 1}
        data = {"choices": [{"text": "a"}], "usage": usage}
        return httpx.Response(200, content=pieces_of(f"data: {json.dumps(data)}\n\n".encode()))

    async def go() -> Prompts:
        async with answering(handle) as http:
            dialect = await find_dialect(http, "auto", None)
            assert dialect.model == "theirs"
            return await calibrate(http, dialect, 103)

    prompts = asyncio.run(go())
    assert len(prompts.make().split()) == 50
    assert prompts.make() != prompts.make()


def with_argument(text: str) -> list[str]:
    """The processes whose command line has it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


def compare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "bench/compare.py", "--quick", "--rounds", "1", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=CLEAN, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.fixture
def own_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """Give the tiny model a path that no other process was called with."""
    folder = tmp_path / "compared"
    folder.symlink_to(tiny_folder)
    return folder


def test_compare_with_ours_alone(own_folder: Path) -> None:
    done = compare("--model", own_folder, "--without", "llama-server", "vllm")
    report = last_line(done)
    assert "llama-server: left out" in done.stdout and "transformers: not asked for" in done.stdout
    assert report["servers"].keys() == {"rivulet"}
    loads = report["servers"]["rivulet"]["loads"]
    assert [result[0]["output_tokens"] for result in loads.values()] == [16, 32]
    assert all(row["values"]["rivulet"] > 0 and row["ratio"] is None for row in report["figures"])
    assert report["machine"]["cores"] >= 1
    assert with_argument(str(own_folder)) == []


def test_compare_without_the_peers_that_fail(own_folder: Path, make_executable: Callable[..., Path]) -> None:
    """One that ends at once, and one that never gets ready and leaves a child."""
    ends = make_executable("llama-server", "echo no such processor; exit 3")
    hangs = make_executable("vllm", "sleep 987654 & trap '' TERM; while :; do sleep 1; done")
    done = compare(
        *("--model", own_folder, "--llama-server", ends, "--llama-model", own_folder / "x.gguf"),
        *("--vllm", hangs, "--patience", "12"),
    )
    report = last_line(done)
    servers = report["servers"]
    assert "status 3" in servers["llama-server"]["failed"] and "no such processor" in done.stdout
    assert "not ready after 12 s" in servers["vllm"]["failed"]
    assert len(servers["rivulet"]["loads"]) == 2
    assert with_argument("sleep 987654") == with_argument(str(own_folder)) == []


@pytest.fixture
def make_executable(tmp_path: Path) -> Callable[..., Path]:
    """Write a shell script that stands in for a peer."""

    def make(name: str, script: str) -> Path:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return make


def test_compare_ends_what_it_started_when_it_is_ended(own_folder: Path) -> None:
    command = [sys.executable, "bench/compare.py", "--rounds", "1000", "--without", "llama-server", "vllm"]
    process = subprocess.Popen(
        [*command, "--quick", "--model", own_folder], cwd=ROOT, env=CLEAN, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        while "round 2" not in (line := process.stderr.readline()):
            assert line, "it ended by itself"
        process.terminate()
        time.sleep(0.05)
        process.terminate()  # one who is in a hurry
        assert process.wait(30) == 143
    finally:
        process.kill()
    assert with_argument(str(own_folder)) == []


def test_compare_with_a_model_that_is_not_there(tmp_path: Path) -> None:
    done = compare("--model", tmp_path / "none")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
