"""What /openapi.json promises holds: schemathesis calls each operation with bodies that fit and others."""

import json
from pathlib import Path

import pytest
from live import LiveServer
from venvs import venv

CLIENTS = Path(__file__).with_name("clients")
PROMISED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


@pytest.mark.timeout(600)  # the first run on a machine installs it
def test_every_answer_is_as_described(tiny_server: LiveServer, tmp_path: Path) -> None:
    client = venv("schemathesis", "schemathesis==4.32.5")
    report = tmp_path / "report.json"
    client.run(
        *("-m", "schemathesis.cli", "run", tiny_server.url + "/openapi.json"),
        *("--checks", ",".join(PROMISED), "--phases", "fuzzing", "--max-examples", "15"),
        *("--generation-deterministic", "--continue-on-failure", "--no-shrink", "--request-timeout", "60"),
        *("--report-json-path", report, "--warnings", "off", "--no-color"),
        environment={"SCHEMATHESIS_HOOKS": "schema_hooks", "PYTHONPATH": str(CLIENTS)},
    )
    told = json.loads(report.read_text())
    assert told["complete"]
    assert told["operations"]["tested"] == told["operations"]["total"] > 10
    assert told["test_cases"]["generated"] > 100
    tiny_server.wait_until_idle()
