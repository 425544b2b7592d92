"""With what status a command ends: what a supervisor or a script may tell apart."""

from enum import IntEnum


class ExitStatus(IntEnum):
    """128 and a signal's number are left: of a second signal, and of one that nobody can catch."""

    ENDED = 0
    """Done; or told to end by SIGTERM, and ended."""
    CANNOT_SERVE = 1
    """The model, the text or the address cannot be served; one sentence says why."""
    WRONG_CALL = 2
    """A flag or a variable that cannot be."""
    FAULT = 70
    """The engine, or the server around it, ended by a fault of its own; start again."""
    STUCK = 71
    """A step of the model took longer than `step_timeout`; start again."""
    INTERRUPTED = 130
    """Told to end by Ctrl-C, and ended."""
