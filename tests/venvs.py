"""Clients that cannot live beside the project's own pins: a venv each, and npm packages, made once and kept.

They lie in the user's cache under a name that changes with what is asked for, so a second run finds them.
Where a package cannot be had the test skips and says why; with CI set it fails.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

INSTALL_SECONDS = 240
RUN_SECONDS = 120
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "TOKENIZERS_PARALLELISM": "false",
    "NO_PROXY": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
}
"""No client may talk to anything but the server under test."""
PRIVATE = ("PYTHON", "PYTEST", "COV_", "OPENAI_", "ANTHROPIC_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
"""What the surrounding run sets for itself."""


class CannotInstall(Exception):
    """What a client needs cannot be had here."""


class Venv:
    """Python with a client; `run` gives what a script printed."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / "bin" / "python"

    def run(self, *arguments: object, environment: Mapping[str, str] | None = None) -> str:
        """Run a script of tests/clients, or `-m` something (AssertionError if it fails)."""
        return run([str(self.python), *map(str, arguments)], environment=environment)


def venv(name: str, *requirements: str, with_project: bool = False) -> Venv:
    """A venv with `requirements`; `with_project` takes what this one has from here, torch above all.

    A script that runs `with_project` finds the site-packages of here in PROJECT_PACKAGES.
    """
    known = [sys.version, *requirements]
    options: dict[str, str] = {}
    if with_project:
        found = importlib.metadata.distributions()
        known += sorted(f"{one.name}=={one.version}" for one in found)
        options["PYTHONPATH"] = sysconfig.get_paths()["purelib"]  # pip counts what lies there as installed

    def make(folder: Path) -> None:
        install([sys.executable, "-m", "venv", "--without-pip", str(folder)])
        pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
        if with_project:
            pins = folder / "pins.txt"
            pins.write_text(f"torch=={importlib.metadata.version('torch')}\n")
            requirements_and_pins = [*requirements, "--constraint", str(pins)]
        else:
            requirements_and_pins = list(requirements)
        install([*pip, "--quiet", "--no-compile", *requirements_and_pins], options)

    return Venv(made_once(name, known, make))


def npm(name: str, *packages: str) -> Path:
    """A folder whose node_modules has `packages`, each with its version."""
    command = shutil.which("npm")

    def make(folder: Path) -> None:
        if command is None or shutil.which("node") is None:
            raise CannotInstall("node and npm are not installed")
        install([command, "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", *packages])

    return made_once(name, packages, make)


def made_once(name: str, known: Sequence[str], make: Callable[[Path], None]) -> Path:
    """The folder that `make` filled in this run or an earlier one; skips where that cannot be."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rivulet-tests"
    folder = root / f"{name}-{hashlib.sha256(repr(list(known)).encode()).hexdigest()[:16]}"
    done = folder / "complete"
    root.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                make(folder)
            except CannotInstall as error:
                if os.environ.get("CI"):
                    raise
                pytest.skip(f"{name} cannot be installed here: {error}")
            done.touch()
    return folder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock ends with its holder."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def install(command: Sequence[str], more: Mapping[str, str] | None = None) -> None:
    """Run an installer, silently (CannotInstall)."""
    code, said = finish(command, os.environ | (more or {}), INSTALL_SECONDS)
    if code:
        errors = [line[:200] for line in said.splitlines() if "error" in line.lower()] or said.splitlines()
        raise CannotInstall("; ".join(errors[:2]) or f"{command[0]} ended with {code}")


def run(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> str:
    """What a client printed, which must end well (AssertionError)."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(PRIVATE)}
    more = {"PROJECT_PACKAGES": sysconfig.get_paths()["purelib"]} | (environment or {})
    code, said = finish(command, kept | QUIET | more, RUN_SECONDS)
    assert code == 0, f"{command} ended with {code}:\n{said[-6000:]}"
    return said


def finish(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> tuple[int, str]:
    """Run to the end or to the time limit; nothing that it started outlives it."""
    with subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
            return process.returncode, said
        except subprocess.TimeoutExpired:
            return -1, f"error: no end after {seconds} seconds"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
