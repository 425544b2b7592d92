"""What the request bodies of all dialects share: strict types, finite numbers, refusal by name."""

import logging
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.errors import VALIDATION, RequestError

logger = logging.getLogger("rivulet.routes")

MAX_STOP_SEQUENCES = 4


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
Unsupported = Annotated[Any, Field(description="not supported: refused by name")]


class Body(BaseModel):
    """A JSON object whose known fields have exactly their types; unknown ones are passed over."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _note_unknown(cls, body: Any) -> Any:
        if logger.isEnabledFor(logging.DEBUG) and isinstance(body, dict):
            unknown = sorted(str(name)[:40] for name in body.keys() - cls.model_fields.keys())
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
