"""What TGI's native routes take: the bodies, their bounds in TGI's words, and what they mean to the sampler.

Pure functions of a body; what needs the prompt or the grammar compiler is checked in `tgi.py`.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from model.batch import SamplingParams
from server.errors import VALIDATION, RequestError
from server.routes.fields import Body, LogitBias, Number, Seed, Text, TokenIds, Unsupported, read_logit_bias
from server.service import Limits
from server.text.grammar import GrammarSpec

NEUTRAL: dict[str, tuple[Any, ...]] = {"watermark": (False,)}
"""Fields that are known but not supported, with the values that ask for nothing."""


def bounded(description: str | None = None, **bounds: float) -> Any:
    """A field whose bounds `check` holds, in TGI's words; here they are for /openapi.json."""
    return Field(None, description=description, json_schema_extra=dict(bounds))


class GrammarField(Body):
    """What the text must match, in TGI's form."""

    type: Literal["json", "json_object", "json_schema", "regex"]
    value: Any = Field(
        None,
        description="a JSON schema as an object or as text; {schema, name} for json_schema; an expression; "
        "without one, json and json_object take any JSON object",
    )


class Parameters(Body):
    """TGI's generation parameters, with ours beside them."""

    best_of: int | None = bounded("candidates of which the likeliest per token is given", minimum=1)
    temperature: Number | None = bounded("0 is greedy", minimum=0)
    repetition_penalty: Number | None = bounded(exclusiveMinimum=0)
    frequency_penalty: Number | None = bounded(minimum=-2, maximum=2)
    presence_penalty: Number | None = bounded(minimum=-2, maximum=2)
    logit_bias: LogitBias | None = None
    top_k: int | None = bounded(minimum=1)
    top_p: Number | None = bounded("1 keeps all", exclusiveMinimum=0, maximum=1)
    typical_p: Number | None = bounded("1 keeps all", exclusiveMinimum=0, maximum=1)
    min_p: Number | None = bounded(minimum=0, maximum=1)
    do_sample: bool | None = Field(
        None,
        description="draw; a temperature, top_k, top_p, typical_p or min_p asks for it too, "
        "beside false only one that changes something",
    )
    max_new_tokens: int | None = bounded("default: what fits", minimum=1)
    min_new_tokens: int | None = bounded("no end-of-text or stop token before so many", minimum=0)
    min_tokens: int | None = bounded("another name of min_new_tokens", minimum=0)
    return_full_text: bool | None = None
    stop: Annotated[list[Text], Field(fail_fast=True)] = Field(
        default=[], description="the text ends with the first of these that appears in it"
    )
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool = False
    truncate: int | None = bounded("keep this many tokens of the end of the prompt", minimum=1)
    watermark: Unsupported = None
    details: bool = False
    decoder_input_details: bool = False
    seed: Seed | None = None
    top_n_tokens: int | None = bounded(minimum=0)
    grammar: GrammarField | None = None
    adapter_id: Text | None = Field(None, description="name of the adapter to compute with")


class GenerateRequest(Body):
    """The body of /generate and /generate_stream."""

    inputs: Text
    parameters: Parameters | None = None


class CompatRequest(GenerateRequest):
    """The body of POST /."""

    stream: bool = False


def check(parameters: Parameters, limits: Limits, *, stream: bool) -> None:
    """Check what can be checked without the prompt, in TGI's words (RequestError)."""
    p = parameters
    p.refuse(NEUTRAL)
    best_of = 1 if p.best_of is None else p.best_of
    most = limits.max_best_of
    rules = (
        (not stream or best_of == 1, "`best_of` != 1 is not supported when streaming tokens"),
        (most > 1 or best_of == 1, "`best_of` != 1 is not allowed for this endpoint"),
        (0 < best_of <= most, f"`best_of` must be > 0 and <= {most}. Given: {best_of}"),
        (best_of == 1 or samples(p), "you must use sampling when `best_of` is > 1"),
        (p.temperature is None or p.temperature >= 0, "`temperature` must be strictly positive"),
        (
            p.repetition_penalty is None or p.repetition_penalty > 0,
            "`repetition_penalty` must be strictly positive",
        ),
        (_within(p.frequency_penalty, -2, 2), "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        (_within(p.presence_penalty, -2, 2), "`presence_penalty` must be >= -2.0 and <= 2.0"),
        (p.top_p is None or 0 < p.top_p <= 1, "`top_p` must be > 0.0 and < 1.0"),
        (p.typical_p is None or 0 < p.typical_p <= 1, "`typical_p` must be > 0.0 and < 1.0"),
        (p.top_k is None or p.top_k > 0, "`top_k` must be strictly positive"),
        (_within(p.min_p, 0, 1), "`min_p` must be >= 0.0 and <= 1.0"),
        (p.max_new_tokens is None or p.max_new_tokens > 0, "`max_new_tokens` must be strictly positive"),
        (p.min_new_tokens is None or p.min_tokens is None, "give `min_new_tokens` or `min_tokens`, not both"),
        (
            len(p.stop) <= limits.max_stop_sequences,
            f"`stop` supports up to {limits.max_stop_sequences} stop sequences. Given: {len(p.stop)}",
        ),
        (all(p.stop), "`stop` must not contain empty strings"),
        (best_of == 1 or p.seed is None, "`seed` must not be set when `best_of` > 1"),
        (
            _within(p.top_n_tokens, 0, limits.max_top_n_tokens),
            f"`top_n_tokens` must be >= 0 and <= {limits.max_top_n_tokens}. Given: {p.top_n_tokens}",
        ),
        (
            not (stream and p.decoder_input_details),
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
    )
    for holds, message in rules:
        if not holds:
            raise RequestError(VALIDATION, message)


def _within(value: float | None, low: float, high: float) -> bool:
    return value is None or low <= value <= high


def samples(parameters: Parameters) -> bool:
    """Whether tokens are drawn: by `do_sample`, or because a parameter of sampling is given.

    TGI's own client sends `do_sample: false` with everything, so as in TGI (`has_warpers`) that does not
    undo a parameter which changes something; without `do_sample` a neutral one counts, too.
    """
    p = parameters
    if p.temperature == 0:
        return False
    if p.do_sample is not None:
        neutral = ((p.temperature, 1), (p.top_k, 0), (p.top_p, 1), (p.typical_p, 1), (p.min_p, 0))
        return p.do_sample or any(value not in (None, idle) for value, idle in neutral)
    return any(value is not None for value in (p.temperature, p.top_k, p.top_p, p.typical_p, p.min_p))


def read_min_tokens(parameters: Parameters, max_tokens: int) -> int:
    """Output tokens before the output may end, by either name (RequestError)."""
    for name in ("min_new_tokens", "min_tokens"):
        value = getattr(parameters, name)
        if not _within(value, 0, max_tokens):
            message = f"`{name}` must be >= 0 and <= `max_new_tokens` ({max_tokens}). Given: {value}"
            raise RequestError(VALIDATION, message)
    return parameters.min_new_tokens or parameters.min_tokens or 0


def sampling_params(parameters: Parameters, vocab_size: int, max_tokens: int, seed: int) -> SamplingParams:
    """TGI's parameters as ours (RequestError); the prompt's own log-probabilities if they are asked for."""
    p = parameters
    temperature = 1.0 if p.temperature is None else p.temperature
    return SamplingParams(
        temperature=temperature if samples(p) else 0.0,
        top_k=p.top_k or 0,
        top_p=p.top_p or 1.0,
        min_p=p.min_p or 0.0,
        typical_p=p.typical_p or 1.0,
        repetition_penalty=p.repetition_penalty or 1.0,
        frequency_penalty=p.frequency_penalty or 0.0,
        presence_penalty=p.presence_penalty or 0.0,
        logit_bias=read_logit_bias(p.logit_bias, vocab_size),
        min_tokens=read_min_tokens(p, max_tokens),
        seed=seed,
        logprobs=p.top_n_tokens or 0,  # the events tell each token's log-probability
        prompt_logprobs=0 if p.decoder_input_details else None,
    )


def read_grammar(field: GrammarField) -> GrammarSpec:
    """TGI's grammar as ours (RequestError)."""
    kind, value = field.type, field.value
    if kind == "regex":
        if not isinstance(value, str):
            raise invalid_grammar("the value of a regex must be a string")
        return GrammarSpec("regex", _whole(value))
    if kind == "json_schema":
        if not isinstance(value, dict) or "schema" not in value:
            raise invalid_grammar("the value of a json_schema must be an object with a `schema`")
        value = value["schema"]
    elif value is None:
        return GrammarSpec("json_object")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise invalid_grammar("the schema is not valid JSON") from None
    if not isinstance(value, dict):
        raise invalid_grammar("the schema must be an object")
    try:
        return GrammarSpec("json_schema", _whole(json.dumps(value, ensure_ascii=False, allow_nan=False)))
    except (ValueError, RecursionError):
        raise invalid_grammar("the schema is not valid JSON") from None


def invalid_grammar(why: str) -> RequestError:
    """A grammar that cannot be used, in TGI's words."""
    return RequestError(VALIDATION, f"grammar is not valid: {why}")


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid_grammar("it has a lone surrogate, which is no character") from None
    return text
