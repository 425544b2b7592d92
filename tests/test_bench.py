"""`rivulet bench` and bench/compare.py: counts, times, the plot, and how they fail."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from live import LiveServer
from rich.console import Console

from server.bench import measure
from server.bench_http import Address, Broken, Unreachable, exchange
from server.bench_load import (
    TGI,
    Answer,
    BenchError,
    Load,
    OpenAI,
    Prompts,
    calibrate,
    find_dialect,
    run,
)
from server.bench_load import read as read_stream
from server.bench_report import percentile, plot, summarize
from server.config import BenchSettings, InvalidSettings, parse_settings

pytestmark = pytest.mark.alone

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
    assert all(0 < one["ttft_ms"] <= one["total_ms"] for one in result["each"])
    assert all(abs(one["prompt_tokens"] - 60) <= 3 for one in result["each"]), "calibrated, in bytes here"
    assert result["prompt_tokens"] == sum(one["prompt_tokens"] for one in result["each"])
    assert result["tokens_per_second"] == pytest.approx(45 / result["seconds"], rel=0.01)
    # None if each answer came in one piece: the tiny model is faster than a client that has to wait its turn.
    assert result["decode_tokens_per_second"] is None or result["decode_tokens_per_second"] > 0
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


OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


@asynccontextmanager
async def answering(
    answer: Callable[[bytes, bytes], Sequence[bytes]], pause: float = 0.0
) -> AsyncIterator[Address]:
    """A server that writes the pieces which `answer` makes of a request's head and body, then closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        for piece in answer(head, await reader.readexactly(length)):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield Address.parse(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")


def get(*pieces: bytes, pause: float = 0.0) -> tuple[int, str, list[bytes]]:
    """Status, reason and body of an answer that comes in these pieces."""

    async def go() -> tuple[int, str, list[bytes]]:
        async with answering(lambda head, body: pieces, pause) as address:
            got = await exchange(address, "GET", "/x")
            assert [arrived for arrived, _ in got.pieces] == sorted(arrived for arrived, _ in got.pieces)
            return got.status, got.reason, [piece for _, piece in got.pieces]

    return asyncio.run(asyncio.wait_for(go(), 20))


CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def chunks(body: bytes, size: int) -> bytes:
    """A body in chunks of a size, with an extension and a trailer."""
    parts = (body[at : at + size] for at in range(0, len(body), size))
    marked = b"".join(b"%X;x=y\r\n%b\r\n" % (len(part), part) for part in parts)
    return marked + b"0\r\nTrailer: t\r\n\r\n"


@pytest.mark.parametrize("size", [1, 3, 17, 1000])
def test_an_answer_may_come_cut_anywhere(size: int) -> None:
    """In chunks, of a length, up to the close; after an interim answer, too."""
    body = b"data: 1\r\n\r\n" * 5
    length = OK + b"content-length: %d\r\n\r\n" % len(body)
    for whole in (
        CHUNKED + chunks(body, 7),
        b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED + chunks(body, 100) + b"what nobody asked for",
        length + body + b"more",
        OK + b"\r\n" + body,
        b"HTTP/1.0 200 OK\r\n\r\n" + body,
    ):
        status, reason, pieces = get(*(whole[at : at + size] for at in range(0, len(whole), size)))
        assert (status, reason, b"".join(pieces)) == (200, "OK", body)
    assert get(b"HTTP/1.1 204\r\ncontent-length: 0\r\n\r\n") == (204, "", [])


def test_pieces_come_when_they_were_sent() -> None:
    whole = [CHUNKED, b"5\r\nfirst\r\n", b"6\r\nsecond\r\n", b"0\r\n\r\n"]
    assert get(*whole, pause=0.05)[2] == [b"first", b"second"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "without an answer"),
        (CHUNKED[:-4], "middle of an answer"),
        (CHUNKED + b"5\r\nab", "middle of an answer"),
        (CHUNKED + b"2\r\nab\r\n", "middle of an answer"),
        (CHUNKED + b"zz\r\nab\r\n", "invalid literal"),
        (CHUNKED + b"-5\r\nabcdefg\r\n", "-5 bytes"),
        (OK + b"Content-Length: 9\r\n\r\nabc", "middle of an answer"),
        (OK + b"Content-Length: x\r\n\r\nabc", "invalid literal"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "is no HTTP/1.1: 'SSH-2.0-OpenSSH'"),
        (OK + b"X: " + b"y" * 70_000 + b"\r\n\r\n", "longer than 65,536 bytes"),
    ],
)
def test_an_answer_that_is_broken(answer: bytes, words: str) -> None:
    with pytest.raises(Broken, match=words):
        get(answer)


@pytest.mark.parametrize(
    "url", ["http://", "http://host:70000", "http://host:x", "http://[::1", "http://a..b"]
)
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(Broken, match="no address"):
        Address.parse(url)


def test_addresses() -> None:
    address = Address.parse("https://example.org/some/where/")
    assert (address.host, address.port, address.path) == ("example.org", 443, "/some/where")
    assert address.tls is not None
    assert Address.parse("http://[::1]:8000").authority == "[::1]:8000"
    with pytest.raises(Unreachable):
        asyncio.run(exchange(Address.parse("http://127.0.0.1:9"), "GET", "/"))


def test_tls_that_does_not_come_about() -> None:
    """A server that speaks plain HTTP, called by https: the reason is told, not that nobody is there."""

    async def plain() -> None:
        server = await asyncio.start_server(
            lambda reader, writer: writer.write(b"no TLS\r\n"), "127.0.0.1", 0
        )
        async with server:
            port = server.sockets[0].getsockname()[1]
            await exchange(Address.parse(f"https://127.0.0.1:{port}"), "GET", "/")

    with pytest.raises(Broken):
        asyncio.run(asyncio.wait_for(plain(), 20))


def read(dialect: Any, *pieces: bytes) -> Answer:
    """What is made of a stream that comes in these pieces."""

    async def go() -> Answer:
        async with answering(lambda head, body: (OK + b"\r\n", *pieces)) as address:
            streams = await run(address, dialect, Load(1, 1, 8, 8), Prompts(8), lambda done: None)
            return read_stream(dialect, streams[0])

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": {"message": "too\\nlong"}}', "too long"),
        (b'{"error": "Model is overloaded", "error_type": "overloaded"}', "Model is overloaded"),
        (b"<html>busy</html>", "<html>busy</html>"),
        (b"", ""),
    ],
)
def test_a_status_that_is_no_success(body: bytes, words: str) -> None:
    head = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: %d\r\n\r\n" % len(body)

    async def go(dialect: Any) -> None:
        async with answering(lambda _, __: [head + body]) as address:
            await run(address, dialect, Load(2, 5, 8, 8), Prompts(8), lambda done: None)

    for dialect in (OpenAI("m"), TGI()):
        with pytest.raises(BenchError) as error:
            asyncio.run(go(dialect))
        assert str(error.value) == f"the server answered 429 Too Many Requests: {words}"


def test_a_server_that_is_slower_than_the_timeout() -> None:
    """It lists its model, and then takes its time in the middle of a stream."""
    models = b'{"data": [{"id": "slow"}]}'
    event = b'data: {"choices": [{"text": "a"}]}\n\n'

    def answer(head: bytes, body: bytes) -> list[bytes]:
        if head.startswith(b"GET"):
            return [OK + b"Content-Length: %d\r\n\r\n%b" % (len(models), models)]
        return [OK + b"\r\n", *[event] * 1000]

    async def go() -> tuple[int, str]:
        async with answering(answer, pause=0.2) as address:
            settings = BenchSettings(url=f"http://127.0.0.1:{address.port}", requests=3, timeout=1.5)
            out, err = Console(file=StringIO()), Console(file=StringIO())
            return await measure(settings, out, err), err.file.getvalue()

    started = time.monotonic()
    status, words = asyncio.run(go())
    assert time.monotonic() - started < 10
    assert (status, words) == (
        1,
        "rivulet bench: 0 of 3 requests were answered within --timeout 1.5 seconds\n",
    )


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

    def answer(head: bytes, body: bytes) -> list[bytes]:
        if head.startswith(b"GET"):
            return [OK + b"\r\n", b'{"data": [{"id": "theirs"}]}']
        bodies.append(json.loads(body))
        if "ignore_eos" in bodies[-1]:
            refusal = b'{"detail": "Unexpected fields in the request: {\'ignore_eos\'}"}'
            return [b"HTTP/1.1 422 Unprocessable Entity\r\n\r\n", refusal]
        count = 3 + 2 * len(bodies[-1]["prompt"].split())
        usage = {"prompt_tokens": count, "completion_tokens": 1}
        data = {"choices": [{"text": "a"}], "usage": usage}
        return [OK + b"\r\n", f"data: {json.dumps(data)}\n\n".encode()]

    async def go() -> Prompts:
        async with answering(answer) as address:
            dialect = await find_dialect(address, "auto", None)
            assert dialect.model == "theirs"
            return await calibrate(address, dialect, 103)

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


def test_compare_with_ours_alone(own_folder: Path, tmp_path: Path) -> None:
    svg = tmp_path / "bars.svg"
    done = compare("--model", own_folder, "--without", "llama-server", "vllm", "--plot", svg)
    report = last_line(done)
    bars = [bar for bar in ElementTree.parse(svg).iter() if bar.tag.endswith("rect") and len(bar)]
    assert len(bars) == 2 * 2 * 2, "two servers, two loads, two figures"
    assert "medians (smallest to largest round)" in done.stdout
    assert "llama-server: left out" in done.stdout and "transformers: not asked for" in done.stdout
    assert report["servers"].keys() == {"rivulet", "rivulet, no guesses"}
    assert all(row["ratio"] is None for row in report["figures"]), "we are no peers of ours"
    loads = report["servers"]["rivulet"]["loads"]
    assert [result[0]["output_tokens"] for result in loads.values()] == [16, 32]
    assert all(row["values"]["rivulet"] > 0 for row in report["figures"] if row["name"] == "tokens/s in all")
    assert all(row["ratio"] is None for row in report["figures"])
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


def test_compare_with_a_plot_that_cannot_be_written(own_folder: Path, tmp_path: Path) -> None:
    """It is told before anything is measured."""
    done = compare("--model", own_folder, "--plot", tmp_path / "none" / "bars.svg")
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "none/bars.svg cannot be written" in done.stderr


def test_compare_draws_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars as long as their figures are large, load by load; who has none says so."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import chart

    def row(load: str, name: str, **values: float) -> dict[str, Any]:
        spreads = {server: [value / 2, value] for server, value in values.items()}
        return {"load": load, "name": name, "values": values, "spreads": spreads}

    report = {
        "machine": {"processor": "A & B", "model": "1/2/3", "threads": 2},
        "servers": dict.fromkeys(("rivulet", "one", "two", "three", "four", "five")),
        "loads": [{"name": "8 < 9 clients"}, {"name": "idle"}],
        "figures": [
            row("8 < 9 clients", "tokens/s in all", rivulet=400, one=100),
            row("8 < 9 clients", "TTFT p50, ms", rivulet=1, one=3),
        ],
    }
    drawn = ElementTree.fromstring(chart.draw(report))
    lengths = [float(bar.attrib["width"]) for bar in drawn.iter() if bar.tag.endswith("rect") and len(bar)]
    assert lengths == [300, 75, 100, 300]
    texts = [text.text for text in drawn.iter() if text.tag.endswith("text")]
    assert "A & B (1/2/3), 2 threads" in texts and "8 < 9 clients" in texts
    assert texts.count("none") == 2 * 4


def test_compare_tells_medians_and_extremes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import table

    def entry(*speeds: float) -> dict[str, Any]:
        rounds = [{"tokens_per_second": speed, "decode_tokens_per_second": None} for speed in speeds]
        gone = dict.fromkeys(("ttft_ms", "gap_ms"))
        return {"loads": {"8 clients, 128 in": [gone | figures for figures in rounds]}}

    results = {"rivulet": entry(40, 10, 42), "one": entry(10, 20, 11), "two": entry(5), "none": {"loads": {}}}
    rows = table.compare(results, ["8 clients, 128 in"])
    assert rows[0]["values"] == {"rivulet": 40, "one": 11, "two": 5}
    assert rows[0]["spreads"] == {"rivulet": [10, 42], "one": [10, 20], "two": [5, 5]}
    assert (rows[0]["ratio"], rows[0]["goal"]) == (pytest.approx(40 / 11, abs=0.001), 4.0)
    assert rows[1]["values"] == {} and rows[1]["ratio"] is None


def script(name: str, *arguments: str | Path) -> dict[str, Any]:
    """The last line of a script of bench/."""
    command = [sys.executable, f"bench/{name}.py", *arguments]
    return last_line(
        subprocess.run(command, cwd=ROOT, env=CLEAN, capture_output=True, text=True, timeout=120, check=False)
    )


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_steps_beside_the_bandwidth(tiny_folder: Path, kernels: str) -> None:
    size = ("--quick", "--rounds", "2", "--memory-mib", "8", "--threads", "2")
    report = script("step", "--model", tiny_folder, "--kernels", kernels, *size)
    assert report["bandwidth"]["gb_per_second"]["min"] > 0
    assert report["bandwidth"]["reader"] in report["bandwidth"]["trials"]
    one, several = report["steps"]
    assert 0 < one["ms"]["min"] <= one["ms"]["median"] <= one["ms"]["max"]
    assert several["bytes"] - one["bytes"] == report["kv_bytes_per_token"] * (4 * 101 - 17)
    assert one["bytes"] - 17 * report["kv_bytes_per_token"] == report["weight_bytes"]
    layer = 64 * 32 * (4 + 2 + 2) + 4 * 32 * 64 + 3 * 64 * 128
    numbers = 2 * layer + 260 * 64
    assert numbers < report["weight_bytes"] < 5 * numbers, "a byte and a scale each, or four bytes"
    assert one["share_of_bandwidth"]["median"] > 0


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_what_sampling_takes(own_folder: Path, kernels: str) -> None:
    report = script("sampling", "--model", own_folder, "--kernels", kernels, "--rows", "3", "--rounds", "2")
    assert report["rows"] == 3 and len(report["figures"]) == 12
    names = {tuple(figure["ms"]) for figure in report["figures"]}
    assert len(names) == 1 and names.pop()[-1] == "torch's ops"
    assert all(ms > 0 for figure in report["figures"] for ms in figure["ms"].values())


def test_the_footprint(own_folder: Path) -> None:
    size = ("--kv-cache-tokens", "512", "--clients", "4", "--turns", "1", "--starts", "2", "--threads", "2")
    report = script("footprint", "--model", own_folder, *size)
    assert len(report["seconds_to_ready"]) == 2 and all(0 < each < 60 for each in report["seconds_to_ready"])
    assert all(report["resident_mb"][when] > 50 for when in ("ready", "after_load"))
    assert report["tokens"] == 4 * (128 - 64 - 10)
    assert abs(report["tokens_in_the_pool"] - 4 * 118) <= 4 * 3
    times = report["cpu_us_per_token"]
    assert times["event_loop"] > 0 and times["engine_thread"] >= times["engine_python_estimate"] >= 0
    assert with_argument(str(own_folder)) == []
