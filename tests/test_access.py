"""Who may enter: every route against every way to come without a key, also under `python -O`."""

import http.client
import json
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from fastapi.routing import iter_route_contexts
from huggingface_hub import InferenceClient
from huggingface_hub.errors import UnknownError
from live import LiveServer
from wire import metric, wait_for, without_id

from server.app import create_app
from server.config import InvalidSettings, ServeSettings, parse_settings
from server.edge.access import PUBLIC, Keyring, announce

ALICE = "sk-Alice-0123456789"
UNNAMED = "sk-Unnamed-0123456789"
FLAG = "sk-Flag-0123456789"
KEYS = (FLAG, ALICE, UNNAMED)
SECRET = re.compile("sk-|0123456789")
LEAK = re.compile(r"Traceback|0x[0-9a-f]{6,}|/home/|/root/|/tmp/|\.py\b|site-packages")
HELLO: Any = [{"role": "user", "content": "9"}]

Headers = tuple[tuple[str, str | bytes], ...]


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"# who may\n\nalice: {ALICE}\n  {UNNAMED}\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def guarded(serve: Callable[..., LiveServer], script_folder: Path, keys_file: Path) -> LiveServer:
    """A live server with three keys: of a flag, and with and without a name in a file."""
    return serve(script_folder, dtype="float32", api_keys=FLAG, api_keys_file=keys_file)


@pytest.fixture(scope="module")
def optimized(script_folder: Path, keys_file: Path) -> Iterator[int]:
    """The port of the same server as a process in which no assertion counts (CVE-2026-41523)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ("--model", script_folder, "--port", str(port), "--kv-cache-tokens", "1024")
    keys = ("--api-keys", FLAG, "--api-keys-file", keys_file)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RIVULET_")}
    command = [sys.executable, "-O", "-m", "server", "serve", *arguments, *keys, "--log-level", "error"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    def ready() -> bool:
        assert process.poll() is None
        try:
            return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_for(ready, 120)
        yield port
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(params=["guarded", "optimized"])
def port(request: pytest.FixtureRequest) -> int:
    """Of each of the two."""
    server = request.getfixturevalue(request.param)
    return server if isinstance(server, int) else int(server.port)


def routes(server: LiveServer) -> list[tuple[str, str]]:
    """Every method and path that the application routes."""
    app = create_app(server.service, server.settings, server.lifecycle)
    found = []
    for route in iter_route_contexts(app.routes):
        path = str(route.path).replace("{name:path}", server.name)
        found += [(method, path) for method in sorted(route.methods or ())]
    return found


def bearer(key: str | bytes) -> Headers:
    return (("Authorization", b"Bearer " + (key if isinstance(key, bytes) else key.encode())),)


NO_KEY: dict[str, Headers] = {
    "no key": (),
    "wrong": bearer("sk-Wrong-0123456789"),
    "lower case": bearer(ALICE.lower()),
    "upper case": bearer(ALICE.upper()),
    "one more": bearer(ALICE + "0"),
    "one less": bearer(ALICE[:-1]),
    "two keys": bearer(f"{ALICE},{FLAG}"),
    "two spaces": bearer(" " + ALICE),
    "quoted": bearer(f'"{ALICE}"'),
    "empty": bearer(""),
    "not ASCII": bearer(ALICE.encode() + b"\xff\xc3\xa9"),
    "its name": bearer("alice"),
    "the line": bearer(f"alice: {ALICE}"),
    "a comment": bearer("# who may"),
    "no scheme": (("Authorization", ALICE),),
    "Basic": (("Authorization", f"Basic {ALICE}"),),
    "Token": (("Authorization", f"Token {ALICE}"),),
    "scheme alone": (("Authorization", "Bearer"),),
    "twice": bearer(ALICE) * 2,
    "right and wrong": bearer(ALICE) + bearer("sk-Wrong-0123456789"),
    "wrong and right": bearer("sk-Wrong-0123456789") + bearer(ALICE),
    "x-api-key wrong": (("x-api-key", "sk-Wrong-0123456789"),),
    "x-api-key twice": (("x-api-key", ALICE), ("x-api-key", ALICE)),
    "x-api-key with a scheme": (("x-api-key", f"Bearer {ALICE}"),),
    "another header": (
        ("api-key", ALICE),
        ("x-auth-token", ALICE),
        ("Proxy-Authorization", f"Bearer {ALICE}"),
    ),
    "cookie": (("Cookie", f"Authorization=Bearer {ALICE}; api_key={ALICE}"),),
    "Host with a path": (("Host", "x/health?"),),
    "Host that is a path": (("Host", "/health"),),
    "Host with a fragment": (("Host", "127.0.0.1/health#"),),
    "Host of another": (("Host", "evil.example"),),
    "rewritten by a header": (("X-Original-URL", "/health"), ("X-Rewrite-URL", "/health")),
    "forwarded": (("X-Forwarded-Prefix", "/health"), ("X-Forwarded-For", "127.0.0.1")),
    "another method by a header": (("X-HTTP-Method-Override", "GET"),),
}
OTHER_PATHS: dict[str, Callable[[str], str]] = {
    "double slash": lambda path: "/" + path,
    "slash at the end": lambda path: path + "/",
    "up from a public path": lambda path: "/health/.." + path,
    "up from a public path, encoded": lambda path: "/health/%2e%2e" + path,
    "dot": lambda path: "/." + path,
    "encoded dot": lambda path: "/%2e" + path,
    "encoded slash": lambda path: "/health%2f.." + path,
    "encoded question": lambda path: "/health%3f" + path,
    "encoded NUL": lambda path: path + "%00",
    "encoded letters": lambda path: path.replace("e", "%65"),
    "parameter": lambda path: path + ";/health",
    "upper case": str.upper,
    "backslash": lambda path: "/health\\.." + path,
    "query": lambda path: f"{path}?api_key={ALICE}&key={ALICE}&path=/health",
    "whole address": lambda path: "http://127.0.0.1" + path,
}
METHODS = ("HEAD", "OPTIONS", "TRACE", "GET", "POST", "PUT", "PATCH", "DELETE", "PROPFIND")


def send(
    connection: http.client.HTTPConnection, method: str, target: str, headers: Headers = ()
) -> httpx.Response:
    """Exactly this, with nothing made nicer."""
    names = [name.lower() for name, _ in headers]
    connection.putrequest(method, target, skip_host="host" in names, skip_accept_encoding=True)
    for name, value in headers:
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())


def check_refusal(answer: httpx.Response, method: str, path: str) -> None:
    """401 in the dialect of the path, telling nothing."""
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert not SECRET.search(answer.text + str(answer.headers)) and not LEAK.search(answer.text)
    if method == "HEAD":
        assert answer.content == b""
        return
    error = without_id(answer.json(), answer)
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        assert (error["type"], error["error"]["type"]) == ("error", "authentication_error")
    elif path.startswith("/v1/"):
        expected = {"type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
        assert error["error"] == expected | {"message": error["error"]["message"]}
    else:
        assert (list(error), error["error_type"]) == (["error", "error_type"], "unauthorized")


def test_every_route_by_every_way_without_a_key(guarded: LiveServer, port: int) -> None:
    known = routes(guarded)
    assert {"/generate", "/v1/chat/completions", "/info", "/metrics", "/docs"} <= {path for _, path in known}
    rejections = metric(guarded, "rejections_total", reason="unauthorized")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    refused = 0
    for method, path in known:
        for way, headers in NO_KEY.items():
            answer = send(connection, method, path, headers)
            if method in ("GET", "HEAD") and path in PUBLIC:
                assert answer.status_code == 200, (method, path, way)
            else:
                check_refusal(answer, method, path)
                refused += 1
        for way, change in OTHER_PATHS.items():
            target = change(path)
            answer = send(connection, method, target)
            same = change in (OTHER_PATHS["query"],) or target == path
            same |= way == "encoded letters"  # which is another spelling of the same
            if method in ("GET", "HEAD") and path in PUBLIC and same:
                assert answer.status_code == 200, (method, target)
            else:
                assert answer.status_code == 401, (method, target, answer.text)
                refused += 1
    for path in {path for _, path in known}:
        for method in METHODS:
            answer = send(connection, method, path)
            open_to_all = method in ("GET", "HEAD") and path in PUBLIC
            assert (answer.status_code == 401) != open_to_all, (method, path)
            refused += not open_to_all
    connection.close()
    if port == guarded.port:
        assert metric(guarded, "rejections_total", reason="unauthorized") == rejections + refused
    guarded.wait_until_idle(1)


def test_every_key_opens_every_route(guarded: LiveServer, port: int) -> None:
    ways: list[Headers] = [way for key in KEYS for way in (bearer(key), (("x-api-key", key),))]
    ways += [
        (("authorization", f"bEaReR {ALICE}"),),
        (("Authorization", f"Bearer {ALICE} \t"),),  # HTTP says that this white space is not of the value
        (*bearer("hf_a-token-of-the-hub"), ("x-api-key", ALICE)),
        (*bearer(ALICE), ("x-api-key", "none")),
        (*bearer(ALICE), ("Host", "x/health?")),
    ]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    for method, path in routes(guarded):
        for headers in ways:
            answer = send(connection, method, path, headers)
            assert answer.status_code in (200, 400, 422), (method, path, headers)
    # The path that is asked is the path that is routed, whatever the Host says.
    told = send(connection, "GET", "/v1/models", (*bearer(ALICE), ("Host", "x/health?")))
    assert told.json()["object"] == "list"
    for path in ("/v1/models/../../health", "//v1/models", "/info/", "/health/"):
        assert send(connection, "GET", path, bearer(ALICE)).status_code == 404, path
    connection.close()


def test_a_body_without_a_key_is_not_read(guarded: LiveServer) -> None:
    """A great one ends the connection; another passes by, so that whoever sends it sees the answer."""
    with guarded.client() as client:
        for _ in range(3):
            assert client.post("/generate", content=b" " * 900_000).status_code == 401
    for length, closes in ((1_000_001, True), (10, False)):
        connection = http.client.HTTPConnection("127.0.0.1", guarded.port, timeout=10)
        answer = send(connection, "POST", "/generate", (("Content-Length", str(length)),))  # and no body
        assert (answer.status_code, answer.headers.get("connection") == "close") == (401, closes)
        if not closes:
            connection.sock.sendall(b" " * length)
            assert send(connection, "GET", "/health").status_code == 200
        connection.close()


def test_a_key_is_counted_and_logged_by_its_name(
    guarded: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    with guarded.client() as client:
        client.get("/health")  # what came before has been logged by then
        caplog.clear()
        caplog.set_level(logging.INFO)
        body = {"inputs": "9", "parameters": {"max_new_tokens": 2}}
        for key in (*KEYS, "sk-Wrong-0123456789"):
            client.post("/generate", json=body, headers={"Authorization": f"Bearer {key}"})

    def lines() -> list[dict[str, Any]]:
        return [vars(record)["fields"] for record in caplog.records if record.name == "rivulet.access"]

    wait_for(lambda: len(lines()) == 4)
    assert [line["client"] for line in lines()] == ["key-1", "alice", "key-3", "127.0.0.1"]
    assert [line["status"] for line in lines()] == [200, 200, 200, 401]
    assert not SECRET.search(caplog.text + str([vars(record) for record in caplog.records]))


# The settings


def settings(*arguments: str) -> ServeSettings:
    return parse_settings(ServeSettings, arguments, "rivulet serve")


def test_keys_are_shown_nowhere(
    guarded: LiveServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RIVULET_API_KEYS", f"{ALICE}, {UNNAMED}")
    given = settings()
    assert len(Keyring.read(given).owners) == 2
    with pytest.raises(SystemExit):
        settings("--help")
    shown = capsys.readouterr().out
    assert "--api-keys-file" in shown and "list of processes" in " ".join(shown.split())
    with guarded.client(headers={"x-api-key": ALICE}) as client:
        shown += "".join(client.get(path).text for path in ("/info", "/metrics", "/openapi.json"))
    for text in (shown, repr(given), str(given), str(given.model_dump()), repr(Keyring.read(given))):
        assert not SECRET.search(text)


@pytest.mark.parametrize(
    ("lines", "flag", "words"),
    [
        (None, "", "cannot read"),
        ("", "", "holds no key"),
        ("# only this\n\n", "", "holds no key"),
        (f"{ALICE}\nshort-0123\n", "", "line 2: a key has at least 16 characters"),
        (f"bob: {ALICE[:10]}\n", "", "line 1: a key has at least 16 characters"),
        (f"{ALICE} {ALICE}\n", "", "line 1: a key is made of visible ASCII"),
        (f"{ALICE}é\n", "", "line 1: a key is made of visible ASCII"),
        (f"{ALICE}\x00\n", "", "line 1: a key is made of visible ASCII"),
        (f"b o b: {ALICE}\n", "", "line 1: a name is made of"),
        (f": {ALICE}\n", "", "line 1: a "),
        (b"\xff" + ALICE.encode(), "", "no text in UTF-8"),
        (ALICE, f"{FLAG},sk-", "api_keys: key 2: a key has at least"),
    ],
)
def test_keys_that_cannot_be(tmp_path: Path, lines: str | bytes | None, flag: str, words: str) -> None:
    path = tmp_path / "keys"
    if lines is not None:
        path.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    with pytest.raises(InvalidSettings, match=words) as found:
        announce(settings("--api-keys-file", str(path), "--api-keys", flag))
    assert "\n" not in str(found.value)
    assert not SECRET.search(str(found.value))


def test_a_key_that_cannot_be_ends_the_start() -> None:
    command = [sys.executable, "-m", "server", "serve", "--api-keys", "sk-short", "--model", "/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "rivulet serve: api_keys: key 1: a key has at least 16 characters\n"


@pytest.mark.parametrize(
    ("mode", "arguments", "words"),
    [
        (0o600, (), []),
        (0o600, ("--host", "::1"), []),
        (0o600, ("--host", "127.8.8.8"), []),
        (0o600, ("--host", "localhost"), []),
        (0o600, ("--host", "0.0.0.0"), ["listening on 0.0.0.0 without an API key"]),
        (0o600, ("--host", "::"), ["listening on :: without an API key"]),
        (0o600, ("--host", ""), ["listening on every interface without an API key"]),
        (0o600, ("--host", "example.org"), ["listening on example.org without an API key"]),
        (0o600, ("--host", "0.0.0.0", "--api-keys", ALICE), []),
        (0o600, ("--host", "0.0.0.0", "--api-keys-file", "keys"), []),
        (0o640, ("--api-keys-file", "keys"), []),
        (0o644, ("--api-keys-file", "keys"), ["every user of this machine can read the API keys"]),
    ],
)
def test_what_is_warned_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: int,
    arguments: tuple[str, ...],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("keys").write_text(ALICE)
    Path("keys").chmod(mode)
    announce(settings(*arguments))
    assert len(caplog.messages) == len(words)
    assert all(word in message for word, message in zip(words, caplog.messages, strict=True))


# Names: DNS rebinding


@pytest.mark.parametrize(
    ("host", "served"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("localhost.", True),
        ("rivulet.localhost:8000", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("192.168.1.7", True),  # an address cannot be rebound
        ("rivulet:8000", True),  # nor a name without a dot, which the public DNS does not know
        ("host.docker.internal:8000", True),
        ("box.local", True),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("evil.example.", False),
        ("evil.example/localhost", False),
        ("localhost@evil.example", False),
        ("localhost:8000:8000", False),
        ("évil", False),
        ("", False),
    ],
)
def test_names_of_a_server_without_keys(
    script_server: LiveServer, guarded: LiveServer, host: str, served: bool
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", script_server.port, timeout=30)
    for path, type_of in (
        ("/health", lambda error: error["error_type"]),
        ("/v1/models", lambda error: error["error"]["code"] or "forbidden"),
        ("/v1/messages", lambda error: error["error"]["type"]),
    ):
        answer = send(connection, "GET", path, (("Host", host.encode()),))
        assert answer.status_code != 403 if served else answer.status_code == 403
        if not served:
            kind = "permission_error" if path == "/v1/messages" else "forbidden"
            assert type_of(without_id(answer.json(), answer)) == kind
            assert "localhost" in answer.text
    connection.close()
    connection = http.client.HTTPConnection("127.0.0.1", guarded.port, timeout=30)
    assert send(connection, "GET", "/health", (("Host", host.encode()),)).status_code == 200, "keys guard it"
    connection.close()


# CORS

ORIGIN = "https://app.example"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-api-key,anthropic-version,x-stainless-os",
}


def test_pages_of_other_origins_by_default(script_server: LiveServer, guarded: LiveServer) -> None:
    for server, status in ((script_server, 405), (guarded, 401)):
        with server.client() as client:
            preflight = client.options("/v1/chat/completions", headers=PREFLIGHT)
            assert preflight.status_code == status
            for answer in (preflight, client.get("/health", headers=PREFLIGHT)):
                assert not any(name.startswith("access-control") for name in answer.headers)
            # What a page may send without a preflight generates nothing.
            for media in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
                body = json.dumps({"inputs": "9"})
                answer = client.post("/generate", content=body, headers={"Content-Type": media})
                assert answer.status_code == (422 if status == 405 else 401)


def test_pages_of_listed_origins(
    serve: Callable[..., LiveServer], script_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "tauri://localhost"
    server = serve(
        script_folder, dtype="float32", api_keys=ALICE, cors_origins=f"{ORIGIN}, {other}", max_body_bytes=4096
    )

    def fail(*arguments: object) -> None:
        raise RuntimeError("secret")

    with server.client() as client:
        preflight = client.options("/v1/chat/completions", headers=PREFLIGHT)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        allowed = preflight.headers["access-control-allow-headers"].lower().replace(" ", "").split(",")
        assert set(PREFLIGHT["Access-Control-Request-Headers"].split(",")) <= set(allowed)
        assert "access-control-allow-credentials" not in preflight.headers
        key = {"x-api-key": ALICE}
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        long = (("Origin", ORIGIN), ("x-api-key", ALICE), ("Content-Length", "5000"))
        answers = [
            client.get("/v1/models", headers={"Origin": ORIGIN}),
            client.get("/v1/models", headers={"Origin": ORIGIN} | key),
            client.get("/v1/nothing", headers={"Origin": other} | key),
            send(connection, "POST", "/generate", long),
        ]
        monkeypatch.setattr(server.service.tokenizer, "encode", fail)
        answers.append(client.post("/generate", json={"inputs": "9"}, headers={"Origin": ORIGIN} | key))
        monkeypatch.undo()
        assert [answer.status_code for answer in answers] == [401, 200, 404, 413, 500]
        connection.close()
        for answer, origin in zip(answers, (ORIGIN, ORIGIN, other, ORIGIN, ORIGIN), strict=True):
            assert answer.headers["access-control-allow-origin"] == origin
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
            assert answer.headers["vary"] == "Origin"
        for origin in ("https://evil.example", f"{ORIGIN}.evil.example", "null", "https://APP.example"):
            strange = {"Origin": origin}
            assert client.options("/generate", headers=PREFLIGHT | strange).status_code == 400
            answer = client.get("/v1/models", headers=strange | key)
            assert "access-control-allow-origin" not in answer.headers
        assert client.post("/generate", json={"inputs": "9"}, headers=key).status_code == 200


@pytest.mark.parametrize(
    "origin", ["app.example", "https://app.example/", "https://", "https://a b", "https://A.b", "null"]
)
def test_origins_that_cannot_be(origin: str) -> None:
    with pytest.raises(InvalidSettings, match="is no origin"):
        settings("--cors-origins", origin)
    assert settings("--cors-origins", "*, http://localhost:3000").cors_origins == (
        "*",
        "http://localhost:3000",
    )


# What clients see


def test_the_description_asks_for_keys(guarded: LiveServer, script_server: LiveServer) -> None:
    with script_server.client() as client:
        document = client.get("/openapi.json").json()
        assert "security" not in document and "securitySchemes" not in document["components"]
    with guarded.client(headers={"x-api-key": ALICE}) as client:
        document = client.get("/openapi.json").json()
    schemes = document["components"]["securitySchemes"]
    assert document["security"] == [{name: []} for name in schemes]
    assert {scheme["type"] for scheme in schemes.values()} == {"http", "apiKey"}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            is_open = method == "get" and path in PUBLIC
            assert (operation.get("security") == []) == is_open, (method, path)
            assert ("401" in operation["responses"]) != is_open
            if not is_open:
                schema = operation["responses"]["401"]["content"]["application/json"]["schema"]
                name = schema["$ref"].removeprefix("#/components/schemas/")
                assert name in document["components"]["schemas"]


def test_the_openai_client(guarded: LiveServer) -> None:
    def client(key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=guarded.url + "/v1", api_key=key, max_retries=0)

    with client(ALICE) as sdk:
        answer = sdk.chat.completions.create(model=guarded.name, messages=HELLO)
        assert answer.choices[0].message.content
        assert answer._request_id
    with client(ALICE.lower()) as sdk, pytest.raises(openai.AuthenticationError) as refused:
        sdk.models.list()
    assert refused.value.code == "invalid_api_key"
    assert isinstance(refused.value.body, dict)
    assert refused.value.request_id == refused.value.body["request_id"]


def test_the_anthropic_client(guarded: LiveServer) -> None:
    def client(**keys: str) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=guarded.url, max_retries=0, **keys)

    for keys in ({"api_key": ALICE}, {"auth_token": ALICE}):
        with client(**keys) as sdk:
            answer = sdk.messages.create(model=guarded.name, messages=HELLO, max_tokens=5)
            assert answer.content
            assert answer._request_id
            with sdk.messages.stream(model=guarded.name, messages=HELLO, max_tokens=5) as stream:
                assert stream.get_final_text()
    with client(api_key="none") as sdk, pytest.raises(anthropic.AuthenticationError) as refused:
        sdk.messages.create(model=guarded.name, messages=HELLO, max_tokens=5)
    assert isinstance(refused.value.body, dict)
    assert refused.value.request_id == refused.value.body["request_id"]


def test_the_hub_client(guarded: LiveServer) -> None:
    hub = InferenceClient(model=guarded.url, token=ALICE)
    assert hub.text_generation("9", max_new_tokens=3)
    assert hub.chat_completion(HELLO).choices[0].message.content
    with pytest.raises(UnknownError, match="API key is not valid"):  # it knows TGI's kinds of error only
        InferenceClient(model=guarded.url, token="hf_wrong").text_generation("9")
