"""Where the `tokenizers` library fails: a panic of its Rust code is a BaseException, which nobody expects."""

from collections.abc import Iterator
from contextlib import contextmanager

from model.errors import ModelError


class TokenizerError(Exception):
    """The library broke on a text or on ids: the tokenizer's own rules do not hold together."""


@contextmanager
def library_call() -> Iterator[None]:
    """Turn a panic into a TokenizerError; everything else passes."""
    try:
        yield
    except BaseException as error:
        if _is_panic(error):
            raise TokenizerError(one_line(error)) from error
        raise


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever goes wrong while a tokenizer is made from foreign data into a ModelError on `what`."""
    try:
        yield
    except ModelError:
        raise
    except BaseException as error:
        # The library raises bare Exceptions, and Python's own for values that Rust has no room for.
        if isinstance(error, Exception) or _is_panic(error):
            raise ModelError(
                f"{what} cannot be used as a tokenizer ({one_line(error)}); fetching it again may help."
            ) from error
        raise


def one_line(error: BaseException) -> str:
    """What an error says, on one line, short, and without a terminal's control characters."""
    return ascii(" ".join(str(error).split()))[1:-1][:200]


def _is_panic(error: BaseException) -> bool:
    # pyo3 makes the class as it is needed: there is none to import.
    return type(error).__module__ == "pyo3_runtime" and type(error).__name__ == "PanicException"
