"""Servers as processes: how each is called, started, waited for, paused and ended.

Each runs in a session of its own on a free port of the loopback, and whatever it started ends with it.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
GRACE_SECONDS = 5


class PeerError(Exception):
    """Why a server cannot be measured, as one sentence."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What every server is asked to hold."""

    threads: int
    clients: int
    """The most at a time."""
    tokens: int
    """The most of one request, in and out."""


@dataclass(frozen=True, slots=True)
class Peer:
    """How a server is called; `{port}` stands for its port."""

    name: str
    command: Sequence[str]
    ready: str
    """The path that answers 200 once requests are served."""
    note: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    """Its name on /v1, if it does not list it."""


OURS, PLAIN = "rivulet", "rivulet, no guesses"
"""Ours as it comes, which is compared, and without guesses of what follows, which shows what they bring."""


def ours(model: str, demand: Demand, *more: str, name: str = OURS) -> Peer:
    """`rivulet serve` of this checkout."""
    most = max(demand.clients, 1)
    tokens = str(-(-demand.tokens // 16) * 16 * most)
    command = (
        *(sys.executable, "-m", "server", "serve", "--model", model, "--host", HOST, "--port", "{port}"),
        *("--threads", str(demand.threads), "--max-running", str(most), "--kv-cache-tokens", tokens),
        *("--token-budget", str(max(512, most)), "--log-level", "warning", *more),
    )
    return Peer(name, command, "/ready")


def llama(executable: Path, gguf: Path, note: str, demand: Demand) -> Peer:
    """llama.cpp's server: a slot for each client, without a cache of ended prompts where it has one."""
    shown = subprocess.run([executable, "--help"], capture_output=True, text=True, timeout=60, check=False)
    options = {"--cache-ram": "0"}
    known = [part for name, value in options.items() if name in shown.stdout for part in (name, value)]
    command = (
        *(str(executable), "-m", str(gguf), "--host", HOST, "--port", "{port}", *known),
        *("-c", str(demand.tokens * demand.clients), "--parallel", str(demand.clients)),
        *("--threads", str(demand.threads), "--threads-batch", str(demand.threads)),
    )
    return Peer("llama-server", command, "/health", note)


def llama_weights(executable: Path, gguf: Path, scratch: Path, threads: int) -> tuple[Path, str]:
    """The file in Q4_0, which llama.cpp repacks for speed, if `llama-quantize` is beside; and what it is."""
    quantize = executable.with_name("llama-quantize")
    if "Q4_0" in gguf.name:
        return gguf, "Q4_0"
    if not quantize.exists():
        return gguf, f"{gguf.name} as it is: there is no llama-quantize to make Q4_0"
    made = scratch / "Q4_0.gguf"
    command = [quantize, "--allow-requantize", gguf, made, "Q4_0", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        return gguf, f"{gguf.name} as it is: llama-quantize failed with {done.returncode}"
    return made, f"Q4_0 made from {gguf.name}"


def vllm(executable: Path, folder: Path, demand: Demand) -> Peer:
    """VLLM in bfloat16."""
    command = (
        *(str(executable), "serve", str(folder), "--host", HOST, "--port", "{port}", "--dtype", "bfloat16"),
        *("--max-model-len", str(demand.tokens), "--max-num-seqs", str(demand.clients)),
    )
    variables = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    return Peer("vllm", command, "/health", "bf16", variables)


def transformers(executable: Path, folder: Path, scratch: Path, demand: Demand) -> Peer:
    """`transformers serve` in bfloat16, with continuous batching, without which it serves one at a time."""
    blocks = -(-demand.tokens // 32) * demand.clients
    command = (
        *(str(executable), "serve", str(folder), "--host", HOST, "--port", "{port}"),
        *("--dtype", "bfloat16", "--continuous-batching"),
        *("--cb-block-size", "32", "--cb-num-blocks", str(blocks)),
    )
    cache = scratch / "hub"  # /v1/models lists what it holds, and fails where it is not there
    cache.mkdir(exist_ok=True)
    variables = {"OMP_NUM_THREADS": str(demand.threads), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    return Peer("transformers", command, "/health", "bf16, continuous batching", variables, str(folder))


def openvino(python: str, gguf: Path, demand: Demand) -> Peer:
    """openvino-genai behind our own few lines of HTTP; it reads GGUF."""
    command = (
        *(python, str(ROOT / "bench" / "openvino_server.py"), str(gguf), "--port", "{port}"),
        *("--threads", str(demand.threads), "--sequences", str(demand.clients)),
        *("--cache-tokens", str(demand.tokens * demand.clients)),
    )
    return Peer("openvino-genai", command, "/", f"{gguf.name} behind bench/openvino_server.py")


def has_openvino(python: str) -> bool:
    """Whether this Python can import openvino-genai."""
    check = [python, "-c", "import openvino_genai"]
    return subprocess.run(check, capture_output=True, timeout=120, check=False).returncode == 0


def find(given: str | None, name: str) -> Path | None:
    """The executable that was named, or the one on PATH, or beside this Python."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which(given or name) or (None if given else shutil.which(name, path=beside))
    return Path(found).resolve() if found else None


COMPILES_ANEW = "PYTHONDONTWRITEBYTECODE"
"""Where it is set, a server from a checkout would compile all of itself at each start."""


class Running:
    """A server that was started; `stop` ends it and everything that it started."""

    def __init__(self, peer: Peer, scratch: Path) -> None:
        self.peer = peer
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = probe.getsockname()[1]
        self.url = f"http://{HOST}:{port}"
        self.log = scratch / f"{peer.name}.log"
        self.seconds_to_ready: float | None = None
        self._started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [part.format(port=port) if part == "{port}" else part for part in peer.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={k: v for k, v in os.environ.items() if k != COMPILES_ANEW} | peer.variables,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> None:
        """Until requests are served (PeerError if it ends before, or takes longer)."""
        with httpx.Client(base_url=self.url, timeout=5, trust_env=False) as http:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if http.get(self.peer.ready).status_code == 200:
                        break
                self.check()
                if time.monotonic() - self._started > seconds:
                    raise PeerError(f"not ready after {seconds:g} s; its last words: {self.last_words()}")
                time.sleep(0.02)
        self.seconds_to_ready = time.monotonic() - self._started

    def check(self) -> None:
        """Whether it still runs (PeerError if not)."""
        status = self.process.poll()
        if status is not None:
            how = f"status {status}" if status >= 0 else signal.Signals(-status).name
            raise PeerError(f"it ended with {how}; its last words: {self.last_words()}")

    def last_words(self) -> str:
        """The end of its log."""
        return " / ".join(self.log.read_text(errors="replace").split("\n")[-6:])[-600:].strip(" /")

    def pause(self) -> None:
        """Take it off the processor while another one is measured."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on."""
        self._signal(signal.SIGCONT)

    def peak_memory(self) -> int:
        """Bytes: the largest resident sets of its processes, added up."""
        total = 0
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                if os.getsid(int(folder.name)) != self.process.pid:
                    continue
                for line in (folder / "status").read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        total += int(line.split()[1]) * 1024
        return total

    def stop(self) -> None:
        """Ask it to end, wait, then end what is left."""
        self.resume()
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_SECONDS)
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)
