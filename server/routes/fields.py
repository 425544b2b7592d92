"""What the request bodies of all dialects share: strict types, finite numbers, refusal by name."""

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.errors import VALIDATION, RequestError

logger = logging.getLogger("rivulet.routes")

MAX_STOP_SEQUENCES = 4
MAX_STOP_TOKENS = 64
MAX_BIASES = 1024


def _whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError(
            "lone_surrogate", "Input has a lone surrogate, which is no character"
        ) from None
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=1 << 64)]
TokenIds = Annotated[list[int], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)]
LogitBias = Annotated[
    dict[str, Any],
    Field(max_length=MAX_BIASES, description="token id -> what is added to its logit, -100 to 100"),
]
"""Read it with `read_logit_bias`: pydantic's own errors would repeat the keys."""
Unsupported = Annotated[Any, Field(description="not supported: refused by name")]


class Body(BaseModel):
    """A JSON object whose known fields have exactly their types; unknown ones are passed over."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _note_unknown(cls, body: Any) -> Any:
        if logger.isEnabledFor(logging.DEBUG) and isinstance(body, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            unknown = sorted(str(name)[:40] for name in body.keys() - known)
            if unknown:
                logger.debug("passed over unknown fields: %s", ", ".join(map(repr, unknown[:20])))
        return body

    def refuse(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse the fields that are known but not supported, unless they ask for nothing.

        `neutral` gives for each such field the values that ask for nothing.
        """
        for name, values in neutral.items():
            value = getattr(self, name)
            if value is not None and not any(
                value == other and type(value) is type(other) for other in values
            ):
                raise RequestError(VALIDATION, f"`{name}` is not supported", param=name)


def read_logit_bias(field: Mapping[str, Any] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """(token id, bias) for each entry (RequestError)."""
    biases: dict[int, float] = {}
    for key, bias in (field or {}).items():
        number = type(bias) in (int, float) and -100 <= bias <= 100
        # A long row of digits is no token id, and Python would refuse to read it.
        token = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else vocab_size
        if not number or token >= vocab_size or token in biases:
            message = (
                f"`logit_bias` must map token ids (at least 0 and below {vocab_size}, each once) to numbers "
                "from -100 to 100"
            )
            raise RequestError(VALIDATION, message, param="logit_bias")
        biases[token] = float(bias)
    return tuple(biases.items())


def check_stop_token_ids(field: Sequence[int] | None, vocab_size: int) -> tuple[int, ...]:
    """Token ids that end the output, each once (RequestError)."""
    if not all(0 <= token < vocab_size for token in field or ()):
        message = f"`stop_token_ids` must be at least 0 and below {vocab_size}"
        raise RequestError(VALIDATION, message, param="stop_token_ids")
    return tuple(dict.fromkeys(field or ()))
