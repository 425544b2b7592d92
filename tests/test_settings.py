"""The settings object: flags before variables before defaults, checked once, then frozen."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from server.config import GenerateSettings, InvalidSettings, ModelSettings, ServeSettings, parse_settings

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start from an environment without settings of ours."""
    for name in os.environ:
        if name.startswith("RIVULET_"):
            monkeypatch.delenv(name)


def serve(*arguments: str) -> ServeSettings:
    return parse_settings(ServeSettings, arguments, "rivulet serve")


DEFAULTS: dict[str, Any] = {
    "model": "smollm2-135m",
    "revision": None,
    "tokenizer": None,
    "config_fields": (),
    "cache_folder": Path.home() / ".cache/rivulet",
    "device": "auto",
    "dtype": "auto",
    "kernels": "auto",
    "quantize": "auto",
    "threads": None,
    "kv_cache_tokens": None,
    "kv_cache_memory": None,
    "max_model_len": None,
    "max_running": 64,
    "token_budget": 512,
    "speculate": "auto",
    "draft_model": None,
    "speculative_tokens": 8,
    "prefix_cache": True,
    "step_timeout": 120,
    "log_level": "info",
    "log_format": "text",
    "served_model_name": None,
    "served_model_aliases": (),
    "lora": (),
    "host": "127.0.0.1",
    "port": 8000,
    "api_keys": (),
    "api_keys_file": None,
    "cors_origins": (),
    "tls_certificate": None,
    "tls_key": None,
    "max_waiting": 128,
    "max_waiting_tokens": 262_144,
    "max_best_of": 2,
    "max_stop_sequences": 4,
    "max_top_n_tokens": 5,
    "max_body_bytes": 2_000_000,
    "max_connections": 1000,
    "header_timeout": 10,
    "body_timeout": 30,
    "idle_timeout": 75,
    "send_timeout": 30,
    "shutdown_timeout": 30,
    "log_prompts": False,
    "otlp_endpoint": None,
}
ELSEWHERE = {"tls_certificate", "tls_key", "otlp_endpoint"}
"""Checked against the machine when they are parsed: test_edge.py and test_tracing.py try them."""
OTHERS: dict[str, tuple[str, Any]] = {
    "model": ("some/model", "some/model"),
    "revision": ("abc123", "abc123"),
    "tokenizer": ("some/folder", Path("some/folder")),
    "config_fields": ("n_heads=8, use_moe=true", (("n_heads", 8), ("use_moe", True))),
    "cache_folder": ("/var/cache/x", Path("/var/cache/x")),
    "device": ("cpu", "cpu"),
    "dtype": ("float32", "float32"),
    "kernels": ("avx2", "avx2"),
    "quantize": ("q4", "q4"),
    "threads": ("3", 3),
    "kv_cache_tokens": ("4096", 4096),
    "kv_cache_memory": ("2GiB", 2 << 30),
    "max_model_len": ("1024", 1024),
    "max_running": ("8", 8),
    "token_budget": ("256", 256),
    "speculate": ("prompt-lookup", "prompt-lookup"),
    "draft_model": ("some/small-model", "some/small-model"),
    "speculative_tokens": ("4", 4),
    "prefix_cache": ("false", False),
    "log_level": ("debug", "debug"),
    "log_format": ("json", "json"),
    "served_model_name": ("name", "name"),
    "served_model_aliases": ("one, org/two", ("one", "org/two")),
    "lora": ("one=/a, two=/b", (("one", Path("/a")), ("two", Path("/b")))),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("0", 0),
    "max_waiting": ("0", 0),
    "max_best_of": ("1", 1),
    "max_stop_sequences": ("8", 8),
    "max_top_n_tokens": ("0", 0),
    "step_timeout": ("0.5", 0.5),
    "api_keys": ("one, mine: two", (SecretStr("one"), SecretStr("mine: two"))),
    "api_keys_file": ("/etc/rivulet/keys", Path("/etc/rivulet/keys")),
    "cors_origins": ("https://a.example, *", ("https://a.example", "*")),
    "max_waiting_tokens": ("1", 1),
    "max_body_bytes": ("1024", 1024),
    "max_connections": ("1", 1),
    "header_timeout": ("0.25", 0.25),
    "body_timeout": ("86400", 86_400),
    "idle_timeout": ("1", 1),
    "send_timeout": ("1.5", 1.5),
    "shutdown_timeout": ("90", 90),
    "log_prompts": ("true", True),
}
"""Setting -> a value as it is written, and what it means."""


def test_the_defaults() -> None:
    assert serve().model_dump() == DEFAULTS


def test_every_setting_is_tried_here() -> None:
    assert ServeSettings.model_fields.keys() == DEFAULTS.keys() == OTHERS.keys() | ELSEWHERE


@pytest.mark.parametrize("name", OTHERS)
def test_a_setting_as_a_flag_and_as_a_variable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    written, meant = OTHERS[name]
    flag = "--" + name.replace("_", "-")
    expected = DEFAULTS | {name: meant}
    switches = {"prefix_cache": "--no-prefix-cache", "log_prompts": "--log-prompts"}
    given = [switches[name]] if name in switches else [flag, written]
    assert serve(*given).model_dump() == expected
    if name not in switches:
        assert serve(f"{flag}={written}").model_dump() == expected
    monkeypatch.setenv(f"RIVULET_{name.upper()}", written)
    assert serve().model_dump() == expected
    assert ServeSettings().model_dump() == expected
    monkeypatch.setenv(f"RIVULET_{name.upper()}", "nonsense" if name == "port" else written)
    default = DEFAULTS[name]
    if isinstance(default, int | str) and name not in switches:
        assert serve(flag, str(default)).model_dump() == DEFAULTS, "the flag wins"
    if name == "prefix_cache":
        assert serve("--prefix-cache").prefix_cache is True


def flags_of(text: str) -> dict[str, str]:
    """Flag -> its default, of the tables of a document whose first two columns are those."""
    found = {}
    for row in re.findall(r"^\| (`--.*) \|$", text, re.MULTILINE):
        flags, default, *_ = (cell.strip() for cell in row.split("|"))
        names = re.findall(r"`--([a-z-]+)`", flags)
        values = default.split(", ") if len(names) > 1 and ", " in default else [default] * len(names)
        found |= dict(zip(names, values, strict=True))
    return found


def test_the_readme_has_every_setting_and_its_default() -> None:
    told = flags_of((ROOT / "README.md").read_text())
    assert told.keys() == {name.replace("_", "-") for name in ServeSettings.model_fields}
    for name, default in DEFAULTS.items():
        value = told[name.replace("_", "-")].strip("`")
        if isinstance(default, bool):
            assert value == ("on" if default else "off"), name
        elif isinstance(default, int | str):
            assert value == str(default), name


def test_the_limits_of_operations_are_the_real_ones() -> None:
    text = (ROOT / "docs/operations.md").read_text().partition("\n## Limits\n")[2].partition("\n## ")[0]
    limits = {}
    for row in re.findall(r"^\| .* \|$", text, re.MULTILINE):
        _, flags, default, _ = (cell.strip() for cell in row[1:-1].split("|"))
        limits |= dict.fromkeys(re.findall(r"`--([a-z-]+)`", flags), default.replace(",", ""))
    bounds = {name for name in DEFAULTS if name.startswith("max_") or name.endswith("_timeout")}
    bounds -= {"max_best_of", "max_stop_sequences", "max_top_n_tokens"}  # of one dialect: docs/api.md
    assert {name.replace("_", "-") for name in bounds} <= limits.keys()
    for flag, default in limits.items():
        real = DEFAULTS[flag.replace("-", "_")]
        assert real is None or default == str(real), flag


def test_variables_of_others_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PORT", "MODEL", "HOST", "RIVULET_NO_SUCH_SETTING", "RIVULET_PUBLISH"):
        monkeypatch.setenv(name, "9")
    assert serve().model_dump() == DEFAULTS


def test_it_is_frozen() -> None:
    settings = serve()
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 9  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--threads", "0"], "threads: "),
        (["--threads", "1025"], "threads: "),
        (["--kv-cache-tokens", "0"], "kv_cache_tokens: "),
        (["--kv-cache-tokens", "1.5"], "kv_cache_tokens: "),
        (["--kv-cache-memory", "0"], "kv_cache_memory: "),
        (["--kv-cache-memory=-1GiB"], "kv_cache_memory: "),
        (["--kv-cache-memory", "2 lightyears"], "kv_cache_memory: "),
        (["--max-model-len", "1"], "max_model_len: "),
        (["--max-running", "0"], "max_running: "),
        (["--max-running", "4097"], "max_running: "),
        (["--token-budget", "0"], "token_budget: "),
        (["--port", "65536"], "port: "),
        (["--port", "-1"], "port: "),
        (["--port", "nan"], "port: "),
        (["--max-waiting", "-1"], "max_waiting: "),
        (["--max-waiting-tokens", "0"], "max_waiting_tokens: "),
        (["--max-body-bytes", "1023"], "max_body_bytes: "),
        (["--max-connections", "0"], "max_connections: "),
        (["--header-timeout", "0"], "header_timeout: "),
        (["--body-timeout", "inf"], "body_timeout: "),
        (["--idle-timeout", "nan"], "idle_timeout: "),
        (["--send-timeout", "86401"], "send_timeout: "),
        (["--step-timeout", "-1"], "step_timeout: "),
        (["--shutdown-timeout", "soon"], "shutdown_timeout: "),
        (["--cors-origins", "https://a.example/"], "cors_origins: "),
        (["--device", "tpu"], "device"),
        (["--dtype", "int8"], "dtype"),
        (["--log-level", "loud"], "log"),
        (["--log-format", "xml"], "log"),
        (["--prefix-cache", "maybe"], "maybe"),
        (["--no-such-flag"], "--no-such-flag"),
        (["word"], "word"),
        (["--port"], "port"),
        (
            ["--kv-cache-tokens", "5", "--kv-cache-memory", "5"],
            "kv_cache_tokens or kv_cache_memory, not both",
        ),
        (["--max-running", "64", "--token-budget", "63"], "token_budget (63) is below max_running (64)"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(arguments: list[str], text: str) -> None:
    with pytest.raises(InvalidSettings) as refused:
        serve(*arguments)
    assert text in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "pydantic" not in str(refused.value)


def test_each_mistake_has_its_line() -> None:
    with pytest.raises(InvalidSettings) as refused:
        serve("--port", "x", "--threads", "y")
    lines = str(refused.value).splitlines()
    assert [line.partition(":")[0] for line in sorted(lines)] == ["port", "threads"]


def test_a_variable_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIVULET_PORT", "many")
    with pytest.raises(InvalidSettings, match="port: "):
        serve()
    assert serve("--port", "5").port == 5, "a good flag replaces it"


def test_sizes_have_units() -> None:
    sizes = {"1024": 1024, "1KiB": 1024, "2MiB": 2 << 20, "1.5GiB": 3 << 29, "1GB": 10**9}
    for written, size in sizes.items():
        assert serve("--kv-cache-memory", written).kv_cache_memory == size


def test_home_is_found() -> None:
    assert serve("--cache-folder", "~/models").cache_folder == Path.home() / "models"


def test_values_are_taken_as_they_stand() -> None:
    """No value is read as JSON, and one may begin with a dash."""
    for text in ('{"a": 1}', "[1]", "null", "a,b", "ü😎", "1"):
        assert serve("--model", text).model == text
        assert parse_settings(GenerateSettings, [text], "rivulet generate").text == text
    assert serve("--served-model-name=-x").served_model_name == "-x"


def test_generate_has_its_own() -> None:
    settings = parse_settings(
        GenerateSettings,
        ["two words", "--raw", "--max-tokens", "9", "--temperature", "0.5", "--seed", "3", "--threads", "1"],
        "rivulet generate",
    )
    assert (settings.text, settings.raw, settings.max_tokens) == ("two words", True, 9)
    assert (settings.temperature, settings.seed, settings.threads) == (0.5, 3, 1)
    assert GenerateSettings.model_fields.keys() > ModelSettings.model_fields.keys()
    for wrong in (["a", "--temperature", "-1"], ["a", "--temperature", "inf"], ["a", "--port", "1"], []):
        with pytest.raises(InvalidSettings):
            parse_settings(GenerateSettings, wrong, "rivulet generate")


def test_settings_reach_the_server(tiny_folder: Path, serve: Any) -> None:
    live = serve(
        tiny_folder,
        dtype="float32",
        max_running=3,
        max_waiting=4,
        token_budget=48,
        max_model_len=100,
        kv_cache_tokens=320,
        prefix_cache=False,
    )
    scheduler = live.service.engine._scheduler
    assert (scheduler.max_running, scheduler.token_budget) == (3, 48)
    (pool,) = scheduler.tables.pools
    assert pool.prefix_cache is False
    assert pool.num_blocks * pool.block_size == 320
    with live.client() as client:
        info = client.get("/info").json()
        assert info["max_concurrent_requests"] == 7
        assert info["max_total_tokens"] == 100
        assert client.post("/generate", json={"inputs": "x" * 100}).status_code == 422
        prompt = {"prompt": "the same prompt twice, longer than a block", "max_tokens": 1}
        for _ in range(2):
            usage = client.post("/v1/completions", json=prompt).json()["usage"]
            assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_a_cache_smaller_than_the_model_limits_requests(tiny_folder: Path, serve: Any) -> None:
    live = serve(tiny_folder, dtype="float32", kv_cache_tokens=160)
    assert live.service.model.max_model_len == 160
    assert "160" in live.loaded.cache
    with live.client() as client:
        body = {"inputs": "x" * 100, "parameters": {"ignore_eos": True, "details": True}}
        answer = client.post("/generate", json=body).json()
        assert answer["details"]["generated_tokens"] == 60
        assert client.post("/generate", json={"inputs": "x" * 160}).status_code == 422
