"""OpenAI's /v1/chat/completions: messages in, deltas or one message out.

The wire only: what a conversation is to the model stands in `server.conversation`.
"""

import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from model.batch import Token
from server.conversation import Conversation, Toolbox, Turn
from server.errors import VALIDATION, RequestError
from server.generation import Finish, Generation, Prompt, TextOutput
from server.routes.delivery import EventStream, unless_client_leaves
from server.routes.described import OPENAI_ERRORS, answers
from server.routes.fields import Body, Text, Unsupported
from server.routes.messages import Messages, plain_messages
from server.routes.openai import FINISH_REASONS, Envelope, usage
from server.routes.openai_answers import ChatCompletion, ChatCompletionChunk
from server.routes.openai_fields import MAX_TOP_LOGPROBS, SamplingFields, StreamOptions, check_length
from server.service import Service
from server.text.message_parser import Content, Piece, Reasoning
from server.text.tokenizer import Tokenizer
from server.text.tools import MAX_TOOLS


class FunctionField(Body):
    """A function that the model may call."""

    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema; default: no parameters")
    strict: bool | None = Field(None, description="a call that is required follows the schema in any case")


class ToolField(Body):
    """A tool that the model may call; functions only."""

    type: Literal["function"]
    function: FunctionField


class NamedFunction(Body):
    """A function by its name."""

    name: Text


class NamedTool(Body):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(SamplingFields):
    """The body of /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="default: what fits")
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="older name of the same")
    logprobs: bool | None = Field(None, description="tell each token's log-probability")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None, description="and so many of the likeliest tokens; with logprobs only"
    )
    tools: Annotated[list[ToolField], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="default auto with tools; none hides the tools from the model"
    )
    parallel_tool_calls: bool | None = Field(
        None, description="default true; false keeps the first call of an answer"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="plain values for the chat template, such as enable_thinking"
    )
    # Known, but not supported.
    functions: Unsupported = None
    function_call: Unsupported = None
    modalities: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None
    store: Unsupported = None
    best_of: Unsupported = None
    echo: Unsupported = None
    add_generation_prompt: Unsupported = None
    continue_final_message: Unsupported = None
    add_special_tokens: Unsupported = None
    documents: Unsupported = None
    chat_template: Unsupported = None
    include_reasoning: Unsupported = None

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = SamplingFields.NEUTRAL | {
        "functions": ([],),
        "function_call": ("none",),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": ("medium",),
        "web_search_options": (),
        "store": (False,),
        "best_of": (1,),
        "echo": (False,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
        "documents": ([],),
        "chat_template": (),
        "include_reasoning": (True,),
    }

    def conversation(self) -> Conversation:
        """What it asks, whatever the dialect (RequestError)."""
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        choice = self.tool_choice
        named = choice.model_dump() if isinstance(choice, NamedTool) else choice
        return Conversation(
            plain_messages(self.messages),
            Toolbox.read(tools, named, self.parallel_tool_calls),
            self.structure(),
            self.chat_template_kwargs or {},
        )


async def read(body: ChatRequest, service: Service) -> tuple[Turn, list[Prompt]]:
    """Validate a body and encode its conversation: one prompt a choice (RequestError)."""
    body.check(service.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError(VALIDATION, "`top_logprobs` needs `logprobs`", param="top_logprobs")
    turn = await body.conversation().turn(service)
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    limit = service.model.max_model_len
    return turn, body.prompts(
        turn.token_ids,
        check_length(len(turn.token_ids), getattr(body, name), None, limit, ("messages", name)),
        service,
        count=body.choices,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=turn.grammar,
    )


def logprobs_json(tokens: list[Token], tokenizer: Tokenizer) -> dict[str, Any]:
    """Chat's form of log-probabilities."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id)
        return {"token": tokenizer.token_text(token_id), "logprob": logprob, "bytes": list(raw)}

    return {
        "content": [
            entry(token.id, token.logprob) | {"top_logprobs": [entry(id, value) for id, value in token.top]}
            for token in tokens
        ]
    }


@dataclass(slots=True)
class ChoiceWriter:
    """Words one choice's pieces as deltas."""

    index: int
    turn: Turn
    tokenizer: Tokenizer
    held: list[Token] = field(default_factory=list)
    """Tokens whose log-probability was not sent yet: it waits for the next delta."""
    calls: int = 0

    def write(self, output: TextOutput, pieces: list[Piece]) -> list[dict[str, Any]]:
        """The choices of the next chunks: a delta for each piece, and an empty one with the reason."""
        if output.token is not None and output.token.logprob is not None:
            self.held.append(output.token)
        deltas = [self._delta(piece) for piece in pieces]
        if output.finish is not None and self.held and not deltas:
            deltas = [{"content": ""}]
        written = [self.choice(delta) for delta in deltas]
        if written and self.held:
            written[0]["logprobs"] = logprobs_json(self.held, self.tokenizer)
            self.held = []
        if output.finish is not None:
            reason = FINISH_REASONS[output.finish]
            # As OpenAI has it: whoever named the function knows that it is called.
            if self.calls and output.finish is not Finish.LENGTH and self.turn.toolbox.choice.name is None:
                reason = "tool_calls"
            written.append(self.choice({}) | {"finish_reason": reason, "stop_reason": output.stop})
        return written

    def choice(self, delta: dict[str, Any]) -> dict[str, Any]:
        """One choice of a chunk."""
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, Content):
            return {"content": piece.text}
        if isinstance(piece, Reasoning):
            return {"reasoning_content": piece.text}
        call = {"index": self.calls, "id": f"call_{secrets.token_hex(12)}", "type": "function"}
        self.calls += 1
        return {"tool_calls": [call | {"function": {"name": piece.name, "arguments": piece.arguments}}]}


async def choices(generation: Generation, turn: Turn, tokenizer: Tokenizer) -> AsyncIterator[dict[str, Any]]:
    """The chunks' choices: the role at first, then pieces, then an empty delta with the reason."""
    writers: dict[int, ChoiceWriter] = {}
    async for output, pieces in turn.outputs(generation):
        if output.choice not in writers:
            writers[output.choice] = ChoiceWriter(output.choice, turn, tokenizer)
            yield writers[output.choice].choice({"role": "assistant", "content": ""})
        for choice in writers[output.choice].write(output, pieces):
            yield choice


async def collect(generation: Generation, turn: Turn, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The same chunks as whole choices."""
    whole: dict[int, dict[str, Any]] = {}
    async for choice in choices(generation, turn, tokenizer):
        delta = choice.pop("delta")
        entry = whole.setdefault(choice["index"], {"index": choice["index"], "message": {}, "logprobs": None})
        message, logprobs = entry["message"], entry["logprobs"]
        message |= {"role": "assistant"} if "role" in delta else {}
        for name in ("content", "reasoning_content"):
            if name in delta:
                message[name] = message.get(name, "") + delta[name]
        for call in delta.get("tool_calls", ()):
            del call["index"]
            message.setdefault("tool_calls", []).append(call)
        if choice["logprobs"] is not None:
            logprobs = {"content": (logprobs or {"content": []})["content"] + choice["logprobs"]["content"]}
        entry |= choice | {"logprobs": logprobs}
    for entry in whole.values():
        if "tool_calls" in entry["message"]:
            entry["message"]["content"] = entry["message"]["content"] or None
    return [whole[index] for index in sorted(whole)]


def make_router(service: Service) -> APIRouter:
    """The chat route."""
    router = APIRouter(prefix="/v1", tags=["openai"])
    tokenizer = service.tokenizer
    described = answers(
        ChatCompletion, events=ChatCompletionChunk, ending=", then `data: [DONE]`", errors=OPENAI_ERRORS
    )

    @router.post("/chat/completions", responses=described)
    async def chat_completions(request: HttpRequest, body: ChatRequest) -> Response:
        """Answer a conversation, as one message or as a stream of deltas."""
        turn, prompts = await read(body, service)
        generation = service.generate(prompts, request.state.caller)
        options = body.stream_options or StreamOptions()
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        envelope = Envelope("chatcmpl", kind, service.model.name_with(prompts[0].adapter), 1, options)
        if body.stream:
            return EventStream(envelope.events(generation, choices(generation, turn, tokenizer)), generation)
        answer = await unless_client_leaves(request, collect(generation, turn, tokenizer))
        return JSONResponse(envelope.wrap(answer, usage=usage(generation, 1)))

    return router
