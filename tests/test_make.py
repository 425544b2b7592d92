"""The Makefile, with stand-ins for the tools: when it installs, what it runs, and how it fails."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("ruff", "mypy", "pytest", "rivulet")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Make a folder with the Makefile and with an install script and tools that only note their calls."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    for name in ("pyproject.toml", "setup.py"):
        (tmp_path / name).touch()
    for path in ("docker/install.sh", *(f".venv/bin/{name}" for name in TOOLS)):
        script = tmp_path / path
        script.parent.mkdir(parents=True, exist_ok=True)
        name = script.name
        call = f"{name} $*"
        failing = f'[ -z "$FAILS" ] || case "{call}" in "$FAILS"*) exit 1;; esac'
        script.write_text(f'#!/bin/sh\necho "{call}" >>calls\n{failing}\n')
        script.chmod(0o755)
    return tmp_path


def run(checkout: Path, *command: str, fails: str = "") -> subprocess.CompletedProcess[str]:
    # Without what an outer make hands down: this test may itself run under `make test`.
    environment = {
        name: value for name, value in os.environ.items() if not re.match(r"MAKE|MFLAGS|GNUMAKE", name)
    }
    environment["FAILS"] = fails
    return subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def calls(checkout: Path) -> list[str]:
    """Give what was called since the last look."""
    notes = checkout / "calls"
    lines = notes.read_text().splitlines() if notes.exists() else []
    notes.unlink(missing_ok=True)
    return lines


def later(path: Path) -> None:
    """Make a file newer than everything else."""
    newest = max(file.stat().st_mtime for file in path.parent.rglob("*") if file.is_file())
    os.utime(path, (newest + 10, newest + 10))


TESTS = ["pytest -m not alone -n 2 --dist loadfile", "pytest -m alone"]
CHECKS = ["ruff check .", "ruff format --check .", "mypy ", *TESTS]


def test_run_installs_once_and_again_when_the_project_file_changes(checkout: Path) -> None:
    for expected in (["install.sh .venv auto -e .", "rivulet serve --port 9"], ["rivulet serve --port 9"]):
        assert run(checkout, "make", "run", "ARGS=--port 9").returncode == 0
        assert calls(checkout) == expected
    later(checkout / "pyproject.toml")
    assert run(checkout, "make", "run").returncode == 0
    assert calls(checkout) == ["install.sh .venv auto -e .", "rivulet serve"]


def test_test_installs_the_test_extra_once_and_serves_run_as_well(checkout: Path) -> None:
    assert run(checkout, "make", "test", "ARGS=-k 'a or b'").returncode == 0
    assert calls(checkout) == [
        "install.sh .venv auto -e .[test]",
        *CHECKS[:-2],
        *(f"{test} -k a or b" for test in TESTS),
    ]
    assert run(checkout, "make", "test").returncode == 0
    assert calls(checkout) == CHECKS
    assert run(checkout, "make", "run").returncode == 0
    assert calls(checkout) == ["rivulet serve"]


@pytest.mark.parametrize(
    ("fails", "stage"),
    [
        ("ruff check", "ruff check"),
        ("ruff format", "ruff format"),
        ("mypy ", "mypy"),
        ("pytest -m not alone", "pytest"),
        ("pytest -m alone", "pytest by itself"),
    ],
)
def test_test_stops_at_the_first_failure_and_names_it(checkout: Path, fails: str, stage: str) -> None:
    result = run(checkout, "make", "test", fails=fails)
    assert result.returncode != 0
    assert f"make test: FAILED at {stage}" in result.stderr.splitlines()
    made = calls(checkout)[1:]
    assert made == CHECKS[: len(made)]
    assert made[-1].startswith(fails)


def test_a_failed_install_is_tried_again(checkout: Path) -> None:
    result = run(checkout, "make", "run", fails="install.sh .venv")
    assert result.returncode != 0
    assert calls(checkout) == ["install.sh .venv auto -e ."]
    assert run(checkout, "make", "run").returncode == 0
    assert calls(checkout) == ["install.sh .venv auto -e .", "rivulet serve"]


def test_ci_runs_make_test_wherever_it_is_called_from(checkout: Path) -> None:
    (checkout / "elsewhere").mkdir()
    result = run(checkout / "elsewhere", "bash", "../.ci/run")
    assert result.returncode == 0, result.stderr
    assert calls(checkout)[1:] == CHECKS
    assert run(checkout / "elsewhere", "bash", "../.ci/run", fails="pytest -m").returncode != 0


def test_help_is_the_default_and_lists_every_command() -> None:
    shown = run(ROOT, "make").stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert re.findall(r"^make (\w+)", shown, re.MULTILINE) == phony[1].split()
