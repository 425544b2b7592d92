"""Log lines as text or as one JSON object each; either way a line cannot be forged from its content."""

import json
import logging
from datetime import UTC, datetime
from typing import Literal

_PLAIN = {ord(c): f"\\x{ord(c):02x}" for c in map(chr, (*range(9), *range(11, 32), 127))} | {
    0x2028: " ",
    0x2029: " ",
}


class TextFormatter(logging.Formatter):
    """`time level name: message`; control characters are spelled out, further lines indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """One event; only its own traceback may take more lines."""
        return super().format(record).translate(_PLAIN).replace("\n", "\n    ")


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message and, if there is one, the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """One event in one line."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure(level: str, form: Literal["text", "json"]) -> None:
    """Send everything from `level` on to standard error, once for the process."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # other libraries
    logging.getLogger("rivulet").setLevel(level.upper())
    if level == "debug":
        logging.getLogger("uvicorn").setLevel(logging.DEBUG)
