"""Who may enter: API keys on every path but four, names that a server without keys answers to, and CORS.

A key decides by the path as it will be routed and by nothing else of the request: not by its Host.
"""

import hashlib
import hmac
import ipaddress
import logging
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from server.caller import CALLER, Caller
from server.config import InvalidSettings, ServeSettings
from server.errors import FORBIDDEN, UNAUTHORIZED, Kind, RequestError, error_response

logger = logging.getLogger("rivulet.access")

PUBLIC = frozenset({"/", "/health", "/ping", "/ready"})
"""Read without a key, for supervisors have none; a stranger learns whether the server is up, and no more."""
LEAST_KEY = 16
"""Characters: shorter keys can be guessed."""
KEY = re.compile(r"[\x21-\x7e]+")
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
PRIVATE_DOMAINS = {"localhost", "local", "internal"}
"""Top-level domains that nobody can register: only this machine and its network say what they mean."""
MOST_PASSED_BY = 1_000_000
"""Bytes of a refused body that are dropped as they come, so that who sends first sees the answer."""


def is_public(scope: Scope) -> bool:
    """Whether a request needs no key; any spelling but the exact one does."""
    return scope["method"] in ("GET", "HEAD") and scope["path"] in PUBLIC


@dataclass(frozen=True, slots=True)
class Keyring:
    """The keys that open the server, as digests, each with the name by which its requests are counted."""

    owners: tuple[tuple[bytes, str], ...] = field(default=(), repr=False)

    @classmethod
    def read(cls, settings: ServeSettings) -> "Keyring":
        """The keys of the settings and of their file (InvalidSettings in words that repeat no key)."""
        given = [(f"api_keys: key {i}", key.get_secret_value()) for i, key in enumerate(settings.api_keys, 1)]
        if settings.api_keys_file is not None:
            given += _lines(settings.api_keys_file)
        owners = []
        for number, (place, line) in enumerate(given, 1):
            name, separator, key = line.rpartition(": ")
            name, key = (name.strip(), key.strip()) if separator else (f"key-{number}", line)
            if not NAME.fullmatch(name):
                raise InvalidSettings(f"{place}: a name is made of at most 64 letters, digits, `.`, `_`, `-`")
            if not KEY.fullmatch(key):
                raise InvalidSettings(f"{place}: a key is made of visible ASCII characters, without spaces")
            if len(key) < LEAST_KEY:
                raise InvalidSettings(f"{place}: a key has at least {LEAST_KEY} characters")
            owners.append((_digest(key.encode()), name))
        return cls(tuple(owners))

    def owner(self, key: bytes) -> str | None:
        """Whose key it is, in a time that does not tell how much of it was right, nor which it was."""
        digest, owner = _digest(key), None
        for known, name in self.owners:
            owner = name if hmac.compare_digest(digest, known) else owner
        return owner


def _lines(path: Path) -> list[tuple[str, str]]:
    """A file's keys, each with the place where it stands (InvalidSettings)."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        reason = error.strerror or "it cannot be read"
        raise InvalidSettings(f"api_keys_file: cannot read {path}: {reason}") from None
    except UnicodeDecodeError:
        raise InvalidSettings(f"api_keys_file: {path} is no text in UTF-8") from None
    keys = [
        (f"api_keys_file: {path}, line {number}", text)
        for number, line in enumerate(lines, 1)
        if (text := line.strip()) and not text.startswith("#")
    ]
    if not keys:
        raise InvalidSettings(f"api_keys_file: {path} holds no key")
    return keys


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Guard:
    """ASGI middleware: answers 401 to a request without a key, and gives the others their key's name."""

    def __init__(self, app: ASGIApp, keys: Keyring, refused: Callable[[Kind], None]) -> None:
        self.app = app
        self.keys = keys
        self.refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or refuse without a look at the body."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        owners = [self.keys.owner(key) for key in _presented(scope)]
        owner = next(filter(None, owners), None)
        if owner is None and not is_public(scope):
            self.refused(UNAUTHORIZED)
            text = "no API key was given" if not owners else "the API key is not valid"
            text += ": send `Authorization: Bearer KEY` or `x-api-key: KEY`"
            await _refuse(RequestError(UNAUTHORIZED, text, code="invalid_api_key"), scope, receive, send)
            return
        if owner is not None:
            caller: Caller = replace(scope["state"]["caller"], client=owner)
            scope["state"]["caller"] = caller
            CALLER.set(caller)
        await self.app(scope, receive, send)


def _presented(scope: Scope) -> list[bytes]:
    """The keys in the request's headers; one that comes twice counts as none, for it has two meanings."""
    bearers = [value for name, value in scope["headers"] if name == b"authorization"]
    keys = [value for name, value in scope["headers"] if name == b"x-api-key"]
    presented = keys if len(keys) == 1 else []
    if len(bearers) == 1:
        scheme, _, key = bearers[0].partition(b" ")
        if scheme.lower() == b"bearer":
            presented.append(key)
    return presented


class LocalNames:
    """ASGI middleware for a server on loopback without keys: answers 403 to a Host of the public DNS.

    Else any web page could have its own name resolve to 127.0.0.1 and call the server as its own origin
    (DNS rebinding, CVE-2024-28224). A tunnel's or a port map's user says localhost or an address, which no
    stranger can rebind; so are names without a dot. A server that listens wider is warned about instead:
    it cannot know its names.
    """

    def __init__(self, app: ASGIApp, host: str, refused: Callable[[Kind], None]) -> None:
        self.app = app
        self.host = host.lower()
        self.refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or refuse without a look at the body."""
        if scope["type"] == "http" and not self._is_local(dict(scope["headers"]).get(b"host")):
            self.refused(FORBIDDEN)
            text = "this name is not served without an API key: use localhost, or start the server with a key"
            await _refuse(RequestError(FORBIDDEN, text), scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_local(self, host: bytes | None) -> bool:
        if host is None:  # HTTP/1.0; a browser always sends one
            return True
        parts = HOST.fullmatch(host)
        if parts is None:
            return False
        name = parts[1].decode().lower().removesuffix(".")
        last = name.rpartition(".")[2]
        return name == self.host or last == name or last in PRIVATE_DOMAINS or _address(name) is not None


async def _refuse(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer at once; a body without a length, or of a great one, is not worth the connection."""
    response = error_response(error, scope["path"])
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    if b"transfer-encoding" in headers or not length.isdigit() or int(length) > MOST_PASSED_BY:
        response.headers["Connection"] = "close"
    await response(scope, receive, send)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def guards(settings: ServeSettings, keys: Keyring, refused: Callable[[Kind], None]) -> list[Middleware]:
    """What stands before every route; `refused` counts by reason."""
    if keys.owners:
        return [Middleware(Guard, keys=keys, refused=refused)]
    if is_loopback(settings.host):
        return [Middleware(LocalNames, host=settings.host, refused=refused)]
    return []


def cross_origin(origins: Sequence[str]) -> list[Middleware]:
    """CORS for the pages of these origins, if any; it goes outside of the guards: a preflight has no key."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),  # the SDKs send headers of their own; none means anything here but the key
            expose_headers=("x-request-id", "request-id", "retry-after"),
            allow_private_network=True,  # these origins may, also from the public internet
        )
    ]


def announce(settings: ServeSettings) -> None:
    """Warn of what leaves the server open, before anything else starts (InvalidSettings)."""
    keys = Keyring.read(settings)
    path = settings.api_keys_file
    if path is not None and path.stat().st_mode & stat.S_IROTH:
        logger.warning("every user of this machine can read the API keys in %s: chmod 600 it", path)
    if not keys.owners and not is_loopback(settings.host):
        logger.warning(
            "listening on %s without an API key: whoever reaches this port may use the model. Set "
            "RIVULET_API_KEYS_FILE or RIVULET_API_KEYS, or see to it that the port is reached from this "
            "machine only (of a container: publish it as 127.0.0.1:PORT:PORT)",
            settings.host or "every interface",
        )
