"""`make soak` in its quick form: a few seconds, a tiny model, every kind of client and fault."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.alone

ROOT = Path(__file__).resolve().parents[1]
FATES = ("answered", "busy", "refused", "too_slow", "left")
QUICK = ("--model", "tiny", "--seconds", "4", "--warmup", "0", "--clients", "12", "--seed", "5")
QUICK += ("--fault-seconds", "0.5", "--health-ms", "0")
"""/health has its true bound in test_load.py and in `make soak`: here there are too few answers for a p99."""


def soak(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "soak", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "tests"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_promise_holds_for_some_seconds() -> None:
    done = soak(*QUICK)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["broken"] == [], done.stderr
    assert done.returncode == 0
    # It has met what it is for: otherwise nothing was shown.
    for fate in FATES:
        assert found["fates"][fate] > 0, found
    assert found["requests"] > 100
    assert sum(found["faults"]["injected"].values()) >= 5
    assert found["faults"]["survived"] == found["faults"]["injected"]
    assert found["most_running"] >= 2
    assert set(found["leaks"].values()) == {0}
    for title in ("requests by fate", "faults", "leaks", "the process"):
        assert title in done.stdout


def test_a_model_that_cannot_be_served_is_no_soak() -> None:
    done = soak("--model", "/no/such/model")
    assert done.returncode == 1
    assert "/no/such/model" in done.stderr
    assert "Traceback" not in done.stderr
