"""What the answers of OpenAI's two text dialects share: usage, chunks, errors in a stream; and the models."""

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from server.errors import RequestError
from server.generation import Finish, Generation
from server.routes.delivery import HOLE, EventForm, event
from server.routes.described import answers
from server.routes.openai_answers import ModelCard, ModelList
from server.routes.openai_fields import StreamOptions, model_not_found
from server.service import Service

FINGERPRINT = f"rivulet-{version('rivulet')}"
"""What computes; TGI's client wants the field to be there."""

DONE = b"data: [DONE]\n\n"

FINISH_REASONS = {Finish.EOS: "stop", Finish.LENGTH: "length", Finish.STOP: "stop"}


def usage(generation: Generation, num_prompts: int) -> dict[str, Any]:
    """Token counts so far; a prompt with several choices counts once."""
    choices_each = len(generation.choices) // num_prompts
    prompts = generation.choices[::choices_each]
    prompt_tokens = sum(len(choice.prompt.token_ids) for choice in prompts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generation.output_tokens,
        "total_tokens": prompt_tokens + generation.output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in prompts)},
    }


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all chunks of an answer have in common."""

    prefix: str
    """Of the id: `chatcmpl` or `cmpl`."""
    object: str
    model: str
    num_prompts: int
    options: StreamOptions
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def wrap(self, choices: list[Any], **more: Any) -> dict[str, Any]:
        """A chunk or an answer around its choices."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
            **more,
        }

    async def events(
        self, generation: Generation, choices: AsyncIterator[dict[str, Any]]
    ) -> AsyncIterator[bytes]:
        """A chunk for each of a stream's choices, then usage if asked for, errors as events, then DONE."""
        form = EventForm(self.wrap([HOLE]))
        counted = self.options.include_usage and self.options.continuous_usage_stats
        try:
            async for choice in choices:
                if counted:
                    yield event(self.wrap([choice], usage=usage(generation, self.num_prompts)))
                else:
                    yield form.fill(choice)
            if self.options.include_usage:
                yield event(self.wrap([], usage=usage(generation, self.num_prompts)))
        except RequestError as error:
            yield event(error.openai_body())
        yield DONE


def make_router(service: Service) -> APIRouter:
    """The model list."""
    router = APIRouter(prefix="/v1", tags=["openai"])
    model = service.model
    cards = {
        name: {
            "id": name,
            "object": "model",
            "created": model.loaded_at,
            "owned_by": "rivulet",
            "max_model_len": model.max_model_len,
        }
        for name in (*model.names, *model.adapters)
    }
    for name in model.adapters:
        cards[name]["parent"] = model.name

    @router.get("/models", responses=answers(ModelList))
    async def models() -> Response:
        """The served model, under each of its names, and its adapters."""
        return JSONResponse({"object": "list", "data": list(cards.values())})

    @router.get("/models/{name:path}", responses=answers(ModelCard, errors=(404,)))
    async def one_model(name: str) -> Response:
        """The served model by one of its names, or an adapter."""
        if name not in cards:
            raise model_not_found(model)
        return JSONResponse(cards[name])

    return router
