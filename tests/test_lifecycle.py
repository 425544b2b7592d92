"""The life of a serving process: loading, ready, draining, ended; what clients and supervisors see of each.

Real processes, whose model comes from a hub that lets a download rest in the middle.
"""

import ctypes
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from checkpoints import byte_tokenizer, make_llama
from processes import Process, environment, free_port, gone
from test_source import Hub, HubHandler
from wire import wait_for

from server.edge.lifecycle import Lifecycle, State
from server.engine.engine import Fault
from server.exits import ExitStatus
from server.phases import Phases

pytestmark = pytest.mark.alone

MODEL = "owner/slow"
CONTEXT = 16_384
PROMPT = {"role": "user", "content": "go on"}
MESSAGES = {"messages": [PROMPT], "ignore_eos": True, "temperature": 0}
LONG = CONTEXT - 200
SAME = {"inputs": "same", "parameters": {"max_new_tokens": 20}}

STREAMS: dict[str, dict[str, Any]] = {
    "/generate_stream": {"inputs": "go on", "parameters": {"max_new_tokens": LONG, "ignore_eos": True}},
    "/v1/completions": {"prompt": "go on", "max_tokens": LONG, "ignore_eos": True, "stream": True},
    "/v1/chat/completions": MESSAGES | {"max_tokens": LONG, "stream": True},
    "/v1/responses": {"input": "go on", "max_output_tokens": LONG, "ignore_eos": True, "stream": True},
    "/v1/messages": MESSAGES | {"max_tokens": LONG, "stream": True, "model": MODEL},
}
"""A stream of each dialect that takes its time."""


class SlowHub(Hub):
    """Stops in the middle of the weights until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = SlowHandler
        self.reached = threading.Event()
        self.goes_on = threading.Event()


class SlowHandler(HubHandler):
    server: SlowHub

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self.command != "GET" or not self.path.endswith(".safetensors"):
            super().send(status, body, headers)
            return
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        half = (start + len(body)) // 2
        self.wfile.write(body[start:half])
        self.server.reached.set()
        assert self.server.goes_on.wait(120)
        self.wfile.write(body[half:])


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlowHub]:
    folder = tmp_path_factory.mktemp("slow")
    byte_tokenizer(folder)
    make_llama(folder, tie=True, seed=1, head_dim=32, max_positions=CONTEXT)
    server = SlowHub()
    server.files[MODEL] = {path.name: path.read_bytes() for path in folder.iterdir()}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.goes_on.set()
    server.shutdown()
    server.server_close()
    thread.join()


class Rivulet:
    """How the processes of this file are started: one model, one cache, one port."""

    def __init__(self, hub: SlowHub, cache: Path) -> None:
        self.hub = hub
        self.cache = cache
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self, *arguments: str) -> Process:
        given = ("--model", MODEL, "--cache-folder", self.cache, "--port", str(self.port))
        size = ("--kv-cache-tokens", str(6 * CONTEXT), "--dtype", "float32")
        return Process(*given, *size, *arguments, HF_ENDPOINT=self.hub.url, HF_HUB_DISABLE_TELEMETRY="1")

    def ask(self, path: str, body: object = None) -> httpx.Response:
        """One call on a connection of its own."""
        method = "GET" if body is None else "POST"
        return httpx.request(method, self.url + path, json=body, timeout=60)

    def status(self, path: str) -> int:
        try:
            return self.ask(path).status_code
        except httpx.TransportError:
            return 0

    def wait_for(self, path: str, status: int) -> None:
        wait_for(lambda: self.status(path) == status, 60)


@pytest.fixture
def rivulet(hub: SlowHub, tmp_path_factory: pytest.TempPathFactory) -> Rivulet:
    return Rivulet(hub, tmp_path_factory.getbasetemp() / "lifecycle-cache")


def refused(answer: httpx.Response, path: str, text: str) -> None:
    """A 503 in the dialect of its path."""
    assert answer.status_code == 503, (path, answer.text)
    assert int(answer.headers["retry-after"]) > 0
    body = answer.json()
    if path == "/v1/messages":
        assert (body["type"], body["error"]["type"]) == ("error", "overloaded_error")
        assert text in body["error"]["message"]
    elif path.startswith("/v1"):
        assert body["error"]["type"] == "server_error"
        assert text in body["error"]["message"]
    else:
        assert body["error_type"] == "unavailable"
        assert text in body["error"]


PATHS = (*STREAMS, "/", "/generate", "/tokenize", "/v1/embeddings")


def test_a_loading_that_is_killed_and_begun_again(rivulet: Rivulet) -> None:
    with rivulet.start() as first:
        assert rivulet.hub.reached.wait(60)
        ready = rivulet.ask("/ready")
        assert ready.status_code == 503
        assert ready.json() == {"status": "loading", "reason": "the model is loading: find the model"}
        assert ready.headers["retry-after"]
        for path in ("/health", "/ping", "/"):
            health = rivulet.ask(path)
            assert (health.status_code, health.json()["error"]) == (503, "unhealthy"), path
        with httpx.Client(base_url=rivulet.url) as client:  # on one connection
            for path in PATHS:
                answer = client.post(path, json={"anything": 1})
                refused(answer, path, "the model is loading")
                assert "close" not in answer.headers.get("connection", "")
        refused(rivulet.ask("/v1/models"), "/v1/models", "the model is loading")
        refused(rivulet.ask("/metrics"), "/metrics", "the model is loading")
        first.process.kill()
        assert first.end() == -signal.SIGKILL
    assert not list(rivulet.cache.rglob("*.safetensors")), "half a file has its name"

    with rivulet.start("--shutdown-timeout", "0.3") as second:
        rivulet.wait_for("/ready", 503)
        rivulet.hub.goes_on.set()
        rivulet.wait_for("/ready", 200)
        assert rivulet.ask("/ready").json() == {"status": "ready"}
        (kept,) = rivulet.cache.rglob("*.safetensors")
        assert kept.read_bytes() == rivulet.hub.files[MODEL]["model.safetensors"]
        too_long_for_the_drain(rivulet, second)


def too_long_for_the_drain(rivulet: Rivulet, server: Process) -> None:
    """Streams of each dialect end with an error event, an answer with an error, the process with 0."""
    with ThreadPoolExecutor(len(STREAMS) + 1) as pool:
        calls = {path: pool.submit(rivulet.ask, path, body) for path, body in STREAMS.items()}
        whole = pool.submit(rivulet.ask, "/v1/completions", STREAMS["/v1/completions"] | {"stream": False})
        wait_for(lambda: "rivulet_requests_running 6.0" in rivulet.ask("/metrics").text, 30)
        told = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        ends = {path: call.result().text.strip().split("\n\n") for path, call in calls.items()}
        answer = whole.result()
        assert server.end() == ExitStatus.ENDED
    assert time.monotonic() - told < 10, "the deadline is not kept"
    wait_for(lambda: gone(server.process.pid))
    assert "Traceback" not in server.screen
    with socket.create_server(("127.0.0.1", rivulet.port)):
        pass  # the port is free

    assert answer.status_code == 503
    text = "the server is shutting down"
    *_, last = ends.pop("/generate_stream")
    assert json.loads(last.removeprefix("data:"))["error_type"] == "unavailable"
    assert text in last
    for path in ("/v1/completions", "/v1/chat/completions"):
        *_, error, done = ends.pop(path)
        assert json.loads(error.removeprefix("data:"))["error"]["message"] == text, path
        assert done == "data: [DONE]"
    *_, error, failed = ends.pop("/v1/responses")
    assert error.startswith("event: error\n")
    assert text in error
    assert failed.startswith("event: response.failed\n")
    *_, error = ends.pop("/v1/messages")
    assert error.startswith("event: error\n")
    assert text in error
    assert not ends


def test_a_drain_a_second_signal_and_a_native_fault(rivulet: Rivulet) -> None:
    rivulet.hub.goes_on.set()
    with rivulet.start("--shutdown-timeout", "300") as server:
        rivulet.wait_for("/ready", 200)
        before = rivulet.ask("/generate", SAME).json()
        drained_and_told_again(rivulet, server)
        assert server.end() == 128 + signal.SIGTERM
    wait_for(lambda: gone(server.process.pid))

    with rivulet.start() as server:  # on the same port and cache
        rivulet.wait_for("/ready", 200)
        assert rivulet.ask("/generate", SAME).json() == before
        with stream(rivulet, LONG):
            server.process.send_signal(signal.SIGSEGV)
            assert server.end() == -signal.SIGSEGV
        assert "Fatal Python error: Segmentation fault" in server.screen
        assert "rivulet-engine" in server.screen or "in execute" in server.screen, "it shows where it was"
        wait_for(lambda: gone(server.process.pid))


def drained_and_told_again(rivulet: Rivulet, server: Process) -> None:
    """While it drains, what runs goes on and what comes is refused; a second signal ends what still runs."""
    with (
        httpx.Client(base_url=rivulet.url) as kept,
        stream(rivulet, LONG) as long,
        stream(rivulet, 1000) as short,
    ):
        assert kept.get("/health").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        rivulet.wait_for("/ready", 503)
        ready = rivulet.ask("/ready")
        assert ready.json() == {"status": "draining", "reason": "the server is shutting down"}
        assert rivulet.ask("/health").status_code == 200, "a supervisor would kill what still streams"
        assert "rivulet_requests_running" in rivulet.ask("/metrics").text
        for path in PATHS:
            answer = rivulet.ask(path, {"anything": 1})
            refused(answer, path, "the server is shutting down")
            assert answer.headers["connection"] == "close"
        from_before = kept.get("/v1/models")
        refused(from_before, "/v1/models", "the server is shutting down")
        *_, last = [line for line in short.iter_lines() if line]
        assert json.loads(last.removeprefix("data:"))["details"]["generated_tokens"] == 1000
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.TransportError):
            long.read()


def stream(rivulet: Rivulet, tokens: int) -> Any:
    """A native stream that has begun."""
    body = {"inputs": "go on", "parameters": {"max_new_tokens": tokens, "ignore_eos": True, "details": True}}
    return httpx.stream("POST", f"{rivulet.url}/generate_stream", json=body, timeout=60)


def test_told_to_end_while_it_downloads(tmp_path: Path) -> None:
    """pip, which asks an index that never answers, ends with it, and leaves nothing behind."""
    with socket.create_server(("127.0.0.1", 0)) as index:
        index.settimeout(60)
        address = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        variables = {"PIP_INDEX_URL": address, "PIP_NO_INDEX": "0", "PIP_CONFIG_FILE": "/dev/null"}
        given = ("--model", "smollm2-135m", "--cache-folder", tmp_path, "--port", "0")
        with Process(*given, **variables) as server:
            asked, _ = index.accept()
            server.process.send_signal(signal.SIGTERM)
            assert server.end() == ExitStatus.ENDED
            asked.close()
            wait_for(lambda: gone(server.process.pid))
            assert "Traceback" not in server.screen
    assert [path.name for path in (tmp_path / "smollm2-135m").iterdir()] == [".lock"]


def test_a_signal_wakes_the_server_whichever_thread_gets_it(rivulet: Rivulet) -> None:
    """The system passes over a main thread that does not run yet, as one that the shell's Ctrl-Z stopped."""
    rivulet.hub.goes_on.set()
    with rivulet.start() as server:
        rivulet.wait_for("/ready", 200)
        time.sleep(1)  # until the main thread has nothing to do any more, which would look for signals too
        main = server.process.pid
        _, _, http, *_ = sorted(int(task.name) for task in Path(f"/proc/{main}/task").iterdir())
        assert ctypes.CDLL(None).tgkill(main, http, signal.SIGTERM) == 0
        told = time.monotonic()
        assert server.end() == ExitStatus.ENDED
        assert time.monotonic() - told < 10


STUCK = """
import ctypes, sys
from model.runner import Runner
from server.cli import main
execute, steps = Runner.execute, iter(range(5))

def stuck(self, batch):
    if next(steps, None) is None:
        ctypes.CDLL(None).pause()
    return execute(self, batch)

Runner.execute = stuck
sys.exit(main(["serve", *sys.argv[1:]]))
"""
"""A server whose model does not come back from its sixth step."""


def test_a_stuck_step_ends_the_process(tiny_folder: Path) -> None:
    port = free_port()
    given = ["--model", str(tiny_folder), "--port", str(port), "--step-timeout", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, *given], env=environment(), stderr=subprocess.PIPE, text=True
    )
    url = f"http://127.0.0.1:{port}"
    seen: set[tuple[int, str]] = set()

    def ready() -> int:
        try:
            answer = httpx.get(f"{url}/ready")
        except httpx.TransportError:
            return 0
        seen.add((answer.status_code, answer.json()["status"]))
        return answer.status_code

    try:
        wait_for(lambda: ready() == 200, 60)
        body = {"inputs": "a", "parameters": {"max_new_tokens": 20, "ignore_eos": True}}
        streamed = httpx.post(f"{url}/generate_stream", json=body, timeout=60).text
        assert json.loads(streamed.strip().rpartition("data:")[2])["error_type"] == "unavailable"
        wait_for(lambda: ready() != 200)
        assert httpx.get(f"{url}/health").status_code == 503
        late = httpx.post(f"{url}/generate", json=body)
        refused(late, "/generate", "a step of the model does not end")
        assert (503, "stuck") in seen
        _, screen = process.communicate(timeout=30)
        assert process.returncode == ExitStatus.STUCK
        assert f"the process ends with status {ExitStatus.STUCK:d}" in screen
    finally:
        process.kill()
        process.wait()


NATIVE = """
import ctypes, sys
from server.edge.lifecycle import Lifecycle
from server.engine.engine import Fault
from server.phases import Phases
from server.process import Ending
ending = Ending(Lifecycle(Phases()), 5)
ending.heed()
ending.on_fault(Fault[sys.argv[1]], "why")
ctypes.CDLL(None).pause()
"""
"""A main thread in a native call that never returns."""


@pytest.mark.parametrize("fault", list(Fault))
def test_each_fault_has_its_status(fault: Fault) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NATIVE, fault.name],
        env=environment(),
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == {Fault.STUCK: 71, Fault.FAILED: 70}[fault], done.stderr


def test_a_fault_is_the_end_of_every_state() -> None:
    phases = Phases()
    lifecycle = Lifecycle(phases)
    with phases.measure("load the weights"):
        phases.fraction = 0.25
        condition = lifecycle.condition
        assert (condition.state, condition.progress) == (State.LOADING, 0.25)
        assert condition.reason.endswith("load the weights")
    lifecycle.drain(0)  # there is nothing to drain yet
    assert lifecycle.state is State.LOADING
    lifecycle.ready()
    assert not lifecycle.drained(0)
    lifecycle.drain(300)
    assert lifecycle.state is State.DRAINING
    assert not lifecycle.drained(1)
    lifecycle.fail(Fault.STUCK, "why")
    assert lifecycle.drained(0), "the drain is over when the fault has ended what ran"
    lifecycle.drain(5)
    assert (lifecycle.state, lifecycle.condition.reason) == (State.STUCK, "why")
    assert not lifecycle.condition.healthy
