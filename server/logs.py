"""Log lines as text or as one JSON object each; either way a line cannot be forged from its content.

A line names the request that it is about. A record's `fields` (a dict) are told beside its message.
"""

import codecs
import json
import logging
from datetime import UTC, datetime
from typing import Any, Literal

from server.caller import CALLER


class TextFormatter(logging.Formatter):
    """`time level name: [request] message field=value`; what is not printable is spelled out."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """One line."""
        caller = CALLER.get()
        if caller is not None:
            record.message = f"[{caller.request_id}] {record.message}"
        parts = [record.message.rstrip("\n"), *(f"{n}={_value(v)}" for n, v in _fields(record).items())]
        record.message = " ".join(parts)
        return _visible(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        """A traceback, indented: only this may take more lines."""
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"    {_visible(line)}" for line in lines)


def _value(value: object) -> str:
    """A field's value; a text that could be taken for more than one is quoted."""
    plain = str(value)
    if isinstance(value, str) and plain.isprintable() and not set(plain) & {" ", '"', "="}:
        return plain
    return json.dumps(value, ensure_ascii=False)


def _visible(text: str) -> str:
    """Control characters, line ends of any kind, marks that turn the direction of writing: spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class JsonFormatter(logging.Formatter):
    """One object a line, in ASCII: time, level, logger, message, then what there is of request and fault."""

    def format(self, record: logging.LogRecord) -> str:
        """One event in one line."""
        caller = CALLER.get()
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().rstrip("\n"),
        }
        if caller is not None:
            entry["request_id"] = caller.request_id
        entry |= _fields(record)
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def configure(level: str, form: Literal["text", "json"]) -> None:
    """Send everything from `level` on to standard error, once for the process."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    own = logging.getLevelNamesMapping()[level.upper()]
    logging.getLogger("rivulet").setLevel(own)
    root.setLevel(max(own, logging.WARNING))  # other libraries
    # uvicorn warns of each request that is no HTTP: whoever sends those could fill the disk.
    logging.getLogger("uvicorn").setLevel(own if own == logging.DEBUG else logging.ERROR)
    codecs.lookup("unicode_escape")  # imported at its first use, when there may be no descriptor left for it
