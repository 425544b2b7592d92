"""What a text must match: JSON schemas, regular expressions, choices and Lark grammars, by llguidance.

A Grammar is compiled once and kept in a bounded cache; each sequence gets a Constraint of its own
from it. Whatever a client writes here costs it an error, in bounded time.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from model.batch import Constraint
from server.text.grammar_source import GrammarError, readable_error, source
from server.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance  # at run time with the first grammar: most servers never see one

__all__ = ["Grammar", "GrammarCompiler", "GrammarError", "GrammarSpec"]

MAX_TEXT = 64 * 1024
"""Characters of a schema, expression or grammar."""
MAX_CACHED = 64

# llguidance reads by recursion, and a text of MAX_TEXT can chain thousands of `$ref`s or rules: on a usual
# stack of 8 MiB that ends the process, 32 MiB were enough for all that was tried. Memory is taken only as the
# stack grows.
STACK_BYTES = 128 * 1024 * 1024

_NAMES = {"regex": "regular expression", "choice": "list of choices", "lark": "grammar"}

# Tried out on hostile texts (tests/test_grammar.py): with llguidance's own limits a 60 kB expression took
# 7 s and 2 GB before it was refused; with these, 0.1 s.
LEXER_FUEL, LEXER_STATES = 50_000, 20_000


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What a client asked for, as text, so that equal ones are found in the cache."""

    kind: Literal["json_schema", "json_object", "regex", "choice", "lark"]
    value: str = ""
    """The schema as JSON, the expression, a JSON list of strings, or the grammar."""
    inside_reasoning: bool = False
    """The prompt opened `<think>`: reasoning comes first, and what follows its `</think>` is held."""


class Grammar:
    """A compiled grammar; any number of sequences may follow it at once."""

    def __init__(self, start: "llguidance.LLMatcher", vocab_size: int) -> None:
        self._start = start
        self._vocab_size = vocab_size
        self._lock = threading.Lock()  # llguidance lets one thread at a time use a matcher

    def start(self) -> Constraint:
        """The state of a sequence that has no output yet."""
        with self._lock:
            return _State(self._start.deep_copy(), self._vocab_size)


class _State:
    """One sequence's place in its grammar; GrammarError if the rest is too complex for the limits."""

    def __init__(self, matcher: "llguidance.LLMatcher", vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def mask(self) -> bytes:
        """Which tokens may come next; EOS exactly if the text is complete. Releases the GIL."""
        return _checked(self._matcher, self._matcher.compute_bitmask)[: -(-self._vocab_size // 8)]

    def advance(self, token_id: int) -> bool:
        """Take a token in; whether nothing may follow it but EOS."""
        if not self._matcher.consume_token(token_id):
            raise GrammarError(readable_error(self._matcher.get_error()))
        return self._matcher.is_stopped()


class GrammarCompiler:
    """Compiles for one tokenizer; call it in a thread, it takes milliseconds, seconds at worst."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._backend: llguidance.LLTokenizer | None = None
        self._known: OrderedDict[GrammarSpec, Grammar] = OrderedDict()
        self._cache = threading.Lock()
        self._compiling = threading.Lock()  # one at a time: hostile texts must not add up

    def compile(self, spec: GrammarSpec) -> Grammar:
        """The grammar, from the cache if it was compiled before (GrammarError)."""
        name = _NAMES.get(spec.kind, "JSON schema")
        if len(spec.value) > MAX_TEXT:
            raise GrammarError(f"the {name} is longer than {MAX_TEXT} characters")
        if (grammar := self._cached(spec)) is not None:
            return grammar
        with self._compiling:
            if (grammar := self._cached(spec)) is not None:
                return grammar
            try:
                grammar = _on_large_stack(lambda: self._compile(spec))
            except GrammarError as error:
                raise GrammarError(f"the {name} cannot be used: {error}") from None
            with self._cache:
                self._known[spec] = grammar
                if len(self._known) > MAX_CACHED:
                    self._known.popitem(last=False)
        return grammar

    def _cached(self, spec: GrammarSpec) -> Grammar | None:
        with self._cache:
            if spec in self._known:
                self._known.move_to_end(spec)
            return self._known.get(spec)

    def _compile(self, spec: GrammarSpec) -> Grammar:
        import llguidance

        try:
            text = source(spec.kind, spec.value, inside_reasoning=spec.inside_reasoning)
        except GrammarError:
            raise
        except ValueError as error:  # llguidance's own, of a schema that is nested too deeply
            raise GrammarError(readable_error(str(error))) from None
        if self._backend is None:
            self._backend = _backend(self._tokenizer)
        limits = llguidance.LLParserLimits(
            initial_lexer_fuel=LEXER_FUEL, max_lexer_states=LEXER_STATES, verbose_errors=False
        )
        start = llguidance.LLMatcher(self._backend, text, log_level=0, limits=limits)
        # The first mask finds what matches nothing or goes beyond the limits at once, and every sequence
        # starts from a copy that knows it.
        _checked(start, start.compute_bitmask)
        return Grammar(start, self._tokenizer.vocab_size)


class _Vocabulary:
    """The tokenizer as llguidance takes it."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        size = tokenizer.vocab_size
        self.tokens = [tokenizer.token_bytes(i) for i in range(size)]
        self.special_token_ids = [i for i in range(size) if tokenizer.is_special(i)]
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_ids = sorted(tokenizer.eos_ids)
        if not self.eos_token_ids:
            # llguidance must have one; this one lies in a word that no mask of ours has.
            end = -(-size // 32) * 32
            self.tokens += [b""] * (end - size) + [b"<end>"]
            self.special_token_ids += range(size, end + 1)
            self.eos_token_ids = [end]
        self.eos_token_id = self.eos_token_ids[0]
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, add_special_tokens=False)


def _backend(tokenizer: Tokenizer) -> "llguidance.LLTokenizer":
    import llguidance

    vocabulary = _Vocabulary(tokenizer)
    return llguidance.LLTokenizer(vocabulary, eos_token=vocabulary.eos_token_ids)  # type: ignore[arg-type]


_Result = TypeVar("_Result")


def _checked(matcher: "llguidance.LLMatcher", action: Callable[[], _Result]) -> _Result:
    """The action's result; GrammarError if it brings, or finds, the matcher in an error."""
    try:
        result = action()
    except ValueError as error:
        raise GrammarError(readable_error(str(error))) from None
    if matcher.is_error():
        raise GrammarError(readable_error(matcher.get_error()))
    return result


def _on_large_stack(action: Callable[[], _Result]) -> _Result:
    """Run in a thread of STACK_BYTES; give its result or raise its error."""
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    # Threads that others start in between get the large stack too, which costs them address space only.
    usual = threading.stack_size(STACK_BYTES)
    try:
        thread = threading.Thread(target=run, name="grammar")
        thread.start()
    finally:
        threading.stack_size(usual)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
