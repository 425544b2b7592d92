"""What the routes work with: the resident model's engine, text tools, limits and metrics, in one object."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from server.caller import Caller
from server.config import ServeSettings
from server.engine.admission import Overloaded
from server.engine.engine import Engine
from server.errors import TEMPLATE, VALIDATION, RequestError, overloaded
from server.generation import Generation, Prompt
from server.metrics import Metrics
from server.text.chat_template import ChatTemplate, TemplateError
from server.text.grammar import Grammar, GrammarCompiler, GrammarError, GrammarSpec
from server.text.tokenizer import Tokenizer

NO_NAMES = ("dummy", "tgi")
"""What huggingface_hub's InferenceClient, and TGI's client and documentation, call whatever is served."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a client may know about the resident model."""

    name: str
    dtype: str
    device: str
    kernels: str
    max_model_len: int
    """Most tokens of prompt and output together."""
    cache_tokens: int
    max_running: int
    max_waiting: int
    loaded_at: int
    """Unix time."""
    aliases: tuple[str, ...] = ()
    """Other names by which /v1 knows it."""
    adapters: tuple[str, ...] = ()
    """Names of the adapters, in order of their numbers, which begin at 1."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every name by which /v1 knows it, its own first."""
        return (self.name, *self.aliases)

    def adapter(self, name: str) -> int | None:
        """The number of the adapter of that name; None if there is none."""
        return 1 + self.adapters.index(name) if name in self.adapters else None

    def name_with(self, adapter: int) -> str:
        """What answers are signed with: the name of an adapter, or the model's own."""
        return self.adapters[adapter - 1] if adapter else self.name


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may ask for at most: all of them together, then a call of the native routes."""

    max_waiting: int = 128
    max_waiting_tokens: int = 262_144
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5

    @classmethod
    def of(cls, settings: ServeSettings) -> "Limits":
        """As the operator set them."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class Service:
    """Everything that a request needs; made once at start."""

    model: ModelInfo
    engine: Engine
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    metrics: Metrics
    grammars: GrammarCompiler
    limits: Limits = Limits()
    # Each takes a thread that waits for a process: slow templates must not take all of them.
    _renders: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))

    def check_room(self, client: str) -> None:
        """Refuse a call where there is no place (RequestError), before any work is spent on its prompt."""
        try:
            self.engine.admission.check(client)
        except Overloaded:
            raise overloaded() from None

    def generate(self, prompts: Sequence[Prompt], caller: Caller | None = None) -> Generation:
        """Admit a call (RequestError if there is no room); the caller closes it.

        `caller` is who sent it, and when; by default this process, now.
        """
        capacity = self.model.max_running + self.model.max_waiting
        if len(prompts) > capacity:
            raise RequestError(
                VALIDATION,
                f"the call asks for {len(prompts)} completions, the server holds {capacity} at most",
            )
        return Generation(prompts, self.engine, self.tokenizer, self.metrics, caller or Caller())

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text (RequestError if it is none), made in a thread: it must not hold the loop."""
        try:
            return tuple(await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens))
        except ValueError as error:
            raise RequestError(VALIDATION, str(error)) from None

    async def compile(self, spec: GrammarSpec, param: str) -> Grammar:
        """A grammar (RequestError that names `param`), compiled in a thread."""
        try:
            return await asyncio.to_thread(self.grammars.compile, spec)
        except GrammarError as error:
            raise RequestError(VALIDATION, str(error), param=param) from None

    async def encode_chat(self, messages: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        """Token ids of a conversation in the model's own template, which writes its own BOS."""
        return await self.encode(await self.render_chat(messages), add_special_tokens=False)

    async def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation in the model's own template (RequestError if that fails), made in a thread."""
        template = self.chat_template
        if template is None:
            raise RequestError(
                VALIDATION, "the model has no chat template: use /v1/completions", param="messages"
            )
        try:
            async with self._renders:
                return await asyncio.to_thread(template.render, messages, tools, **(values or {}))
        except TemplateError as error:
            raise RequestError(TEMPLATE, str(error), param="messages") from None
