"""Hostile clients: broken HTTP, floods, wrong keys, odd JSON; each must be refused, and nobody may notice."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from soak.fates import Fate, Faults, Wrong
from soak.raw import Address, connect

BAD = frozenset({400, 422})
CLOSED = None
"""Instead of a status: the server closes, which is also an answer to what is no HTTP."""
MODEL_ROUTES = ("/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")

ODD_JSON = (
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\xff\xfe",
    b'{"inputs": "\\ud800", "prompt": "\\ud800", "messages": "\\udfff", "input": "\\ud800"}',
    b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"inputs": ' + b"9" * 6000 + b"}",
    b'{"inputs": "", "prompt": "", "messages": [], "input": []}',
)
ODD_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "-1", '"1"', "true", "1.5", str(2**70), "[]")
NUMBER_FIELDS = ("max_tokens", "top_k", "seed", "n", "min_tokens")


@dataclass(frozen=True, slots=True)
class Attack:
    """What is sent, and the statuses that are right for it."""

    name: str
    data: bytes
    expected: frozenset[int | None]


class HostileClients:
    """What hostile clients share."""

    def __init__(self, address: Address, faults: Faults, max_body: int) -> None:
        self._address = address
        self._faults = faults
        self._max_body = max_body

    async def hostile(self, random: Random) -> Fate:
        """One attack."""
        makers: tuple[Callable[[Random], Attack], ...] = (
            *(self._broken_http, self._long_head, self._many_headers, self._huge_body, self._endless_body),
            *(self._odd_json, self._odd_number, self._fan_out, self._wrong_key, self._odd_path),
        )
        attack, began = random.choice(makers)(random), time.monotonic()
        try:
            async with connect(self._address) as connection:
                # Whoever refuses early may close while we still send: the answer may be lost with that.
                closed: frozenset[int | None] = frozenset()
                try:
                    await connection.send(attack.data)
                except OSError:
                    closed = frozenset({CLOSED})
                status = await connection.status()
        except OSError as error:
            return self._faults.excuse_connection(error, began)
        if status == 429:
            return Fate.BUSY  # where there is no place nobody looks at what is asked
        if status not in attack.expected | closed:
            if status in (CLOSED, 503):
                return self._faults.excuse_connection(EOFError(f"{attack.name}: {status}"), began)
            raise Wrong(f"{attack.name}: {status} to {attack.data[:300]!r}")
        return Fate.REFUSED

    def _post(self, name: str, path: str, content: bytes, expected: frozenset[int | None]) -> Attack:
        head = self._address.head("POST", path, f"Content-Length: {len(content)}", "Connection: close")
        return Attack(name, head + content, expected)

    def _broken_http(self, random: Random) -> Attack:
        junk = (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.randbytes(100) + b"\r\n\r\n",
            b"GET\r\n\r\n",
            b"GET /health HTTP/one\r\n\r\n",
            b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
            b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
            b"POST /generate HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n",
            b"GET /health HTTP/1.1\r\nHost: a\r\nBad Header\r\n\r\n",
            b"GET /health HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n",
        )
        # A key is looked for before a body is, so without one 401 may come first.
        return Attack("broken HTTP", random.choice(junk), frozenset({400, 401, 501, 505, CLOSED}))

    def _long_head(self, random: Random) -> Attack:
        head = self._address.head("GET", "/health", "X-Long: " + "a" * 1_000_000)
        return Attack("a head of 1 MB", head, frozenset({400, 413, 431, CLOSED}))

    def _many_headers(self, random: Random) -> Attack:
        head = self._address.head("GET", "/health", *(f"X-{number}: a" for number in range(10_000)))
        return Attack("10,000 headers", head, frozenset({400, 413, 431, CLOSED}))

    def _huge_body(self, random: Random) -> Attack:
        content = b'{"inputs": "' + b"a" * self._max_body + b'"}'
        return self._post("a huge body", random.choice(MODEL_ROUTES), content, frozenset({413}))

    def _endless_body(self, random: Random) -> Attack:
        head = self._address.head("POST", random.choice(MODEL_ROUTES), "Transfer-Encoding: chunked")
        chunks = (b"10000\r\n" + b" " * 0x10000 + b"\r\n") * (self._max_body // 0x10000 + 2)
        return Attack("a body without end", head + chunks, frozenset({413}))

    def _odd_json(self, random: Random) -> Attack:
        return self._post("odd JSON", random.choice(MODEL_ROUTES), random.choice(ODD_JSON), BAD)

    def _odd_number(self, random: Random) -> Attack:
        field, number = random.choice(NUMBER_FIELDS), random.choice(ODD_NUMBERS)
        if field == "top_k":
            number = {"-1": "-2", str(2**70): "1e400"}.get(number, number)  # these two keep every token
        body: dict[str, Any] = {"model": "tgi", "prompt": "a", "max_tokens": 1} | {field: "@"}
        content = json.dumps(body).replace('"@"', number).encode()
        return self._post("an odd number", "/v1/completions", content, BAD)

    def _fan_out(self, random: Random) -> Attack:
        more = random.choice(
            (
                {"n": 10**6},
                {"best_of": 10**6},
                {"prompt": ["a"] * 10**4},
                {"stop": ["a"] * 10**4},
                {"logprobs": 10**6},
                {"logit_bias": {str(token): 1 for token in range(10**4)}},
            )
        )
        content = json.dumps({"model": "tgi", "prompt": "a", "max_tokens": 1} | more).encode()
        return self._post("fan-out", "/v1/completions", content, BAD)

    def _wrong_key(self, random: Random) -> Attack:
        key = self._address.key
        wrong = random.choice((key[:-1], key + "x", key.swapcase(), "", "a" * 5000))
        path = random.choice((*MODEL_ROUTES, "/info", "/v1/models", "/tokenize", "/no/such/path"))
        head = self._address.head("POST", path, "Content-Length: 2", "Connection: close", key=wrong)
        return Attack("a wrong key", head + b"{}", frozenset({401}))

    def _odd_path(self, random: Random) -> Attack:
        path = random.choice(
            ("/v1/../metrics/", "/%2e%2e/etc/passwd", "//v1/completions", "/generate/", "/a" * 900)
        )
        head = self._address.head("POST", path, "Content-Length: 2", "Connection: close")
        return Attack("an odd path", head + b"{}", frozenset({404, 405, 400, 307}))
