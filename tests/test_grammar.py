"""A grammar lets exactly its texts through, EOS exactly at their ends; a hostile one costs only an error."""

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import EOS, byte_tokenizer, byte_tokenizer_metadata, read_metadata
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from server.text.grammar import MAX_CACHED, MAX_TEXT, Grammar, GrammarCompiler, GrammarError, GrammarSpec
from server.text.tokenizer import Tokenizer


class Walk:
    """A text on its way through a grammar, token by token."""

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.state = grammar.start()
        self.ended = False

    def allowed(self) -> set[int]:
        bits = np.frombuffer(self.state.mask(), np.uint8)
        return set(np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist())

    def read(self, text: str) -> "Walk":
        for token_id in self.tokenizer.encode(text, add_special_tokens=False):
            assert token_id in self.allowed(), self.tokenizer.token_text(token_id)
            self.ended = self.state.advance(token_id)
        return self

    def spell(self, text: str) -> "Walk":
        """Read a text by the longest tokens that may come, as a model could write it."""
        rest = text.encode()
        while rest:
            fitting = {i: self.tokenizer.token_bytes(i) for i in self.allowed()}
            best = max(
                (i for i, piece in fitting.items() if piece and rest.startswith(piece)),
                key=lambda i: len(fitting[i]),
            )
            self.ended = self.state.advance(best)
            rest = rest[len(fitting[best]) :]
        return self

    def complete(self) -> bool:
        """Whether EOS may come; then each of them may."""
        ends = self.allowed() & self.tokenizer.eos_ids
        assert ends in (set(), self.tokenizer.eos_ids)
        if self.ended:
            assert self.allowed() == self.tokenizer.eos_ids
        return bool(ends)

    def accepts(self, text: str) -> bool:
        """Whether this is a whole text of the grammar."""
        for token_id in self.tokenizer.encode(text, add_special_tokens=False):
            if token_id not in self.allowed():
                return False
            self.ended = self.state.advance(token_id)
        return self.complete()


def make_tokenizers(folder: Path) -> dict[str, Tokenizer]:
    byte_tokenizer(folder)
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        *'abc{}":,1',
        '{"',
        '▁"',
        "ab",
    ]
    sentencepiece = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces) - 259)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259),
    }
    endless = Backend(models.BPE({char: i for i, char in enumerate("abc")}, []))
    endless.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    endless.decoder = decoders.ByteLevel()
    return {
        "folder": Tokenizer.from_folder(folder),
        "gguf": Tokenizer.from_gguf(byte_tokenizer_metadata() | {"tokenizer.ggml.merges": []}),
        "sentencepiece": Tokenizer.from_gguf(sentencepiece),
        "without eos": Tokenizer(endless),
    }


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return make_tokenizers(tmp_path_factory.mktemp("grammar"))


@pytest.fixture(scope="module")
def compiler(tokenizers: dict[str, Tokenizer]) -> GrammarCompiler:
    return GrammarCompiler(tokenizers["folder"])


@pytest.fixture(scope="module")
def walk(compiler: GrammarCompiler, tokenizers: dict[str, Tokenizer]) -> Callable[[GrammarSpec], Walk]:
    return lambda spec: Walk(compiler.compile(spec), tokenizers["folder"])


def schema(value: object) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(value))


PERSON = schema(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "friends": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
NODE = GrammarSpec("lark", 'start: "(" start* ")"')


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        (
            PERSON,
            ['{"name":"é🙂","age":150}', '{ "name": "", "age": 1, "friends": [{"name":"a","age":2}] }'],
            ["", "{}", '{"name":"abcdef","age":1}', '{"name":"a","age":151}', '{"name":"a","age":1}}', "[]"],
        ),
        (GrammarSpec("json_object"), ["{}", '{"a": [1.5e3, null, {"b": true}]}'], ["[]", "1", "", '{"a"}']),
        (schema(True), ["1", "[[]]", '"x"'], ["", "x"]),
        (schema({"enum": [1, "a", None]}), ["1", '"a"', "null"], ["2", "a"]),
        (schema({"oneOf": [{"type": "string"}, {"type": "null"}]}), ["null", '"b"'], ["1"]),
        (schema({"type": "string", "format": "date"}), ['"2024-02-29"'], ['"2024-13-01"', '"x"']),
        (schema({"type": "number", "multipleOf": 0.25}), ["0.75", "2"], ["0.3"]),
        (GrammarSpec("regex", r"\d{3}-[a-c]+|x?"), ["123-abc", "", "x"], ["12-a", "123-", "123-abd", "xx"]),
        (GrammarSpec("regex", "a/b"), ["a/b"], ["ab"]),
        (
            GrammarSpec("choice", json.dumps(["yes", "yes/no", 'a"b\\n\n\x01é🙂', "yes"])),
            ["yes", "yes/no", 'a"b\\n\n\x01é🙂'],
            ["", "no", "yes/", "yesno"],
        ),
        (NODE, ["()", "(()(()))"], ["", "(", "())"]),
        (GrammarSpec("lark", 'start: "x" %json {"enum": [1]} "\\n"'), ["x1\n"], ["x1", "x2\n"]),
        (GrammarSpec("lark", "start: <|im_start|> /a+/"), ["<|im_start|>aa"], ["aa"]),
        (
            GrammarSpec("regex", "a", inside_reasoning=True),
            ["</think>a", "b\n</think>\n\na"],
            ["a", "</think>b"],
        ),
        (GrammarSpec("choice", '["a"]', inside_reasoning=True), ["é</think>\na"], ["a", "</think>\n\n\na"]),
        (GrammarSpec("json_object", inside_reasoning=True), ["x</think>{}"], ["{}", "x</think>[]"]),
        (GrammarSpec("json_schema", '{"const":1}', inside_reasoning=True), ["x</think>1"], ["x</think>2"]),
        (GrammarSpec("lark", 'start: "a"', inside_reasoning=True), ["x</think>a"], ["a", "x</think>b"]),
    ],
)
def test_exactly_its_texts_pass(
    walk: Callable[[GrammarSpec], Walk], spec: GrammarSpec, good: list[str], bad: list[str]
) -> None:
    assert [text for text in good if not walk(spec).accepts(text)] == []
    assert [text for text in bad if walk(spec).accepts(text)] == []


def test_the_end_is_known_with_the_token_that_brings_it(walk: Callable[[GrammarSpec], Walk]) -> None:
    person = walk(PERSON).read('{"name":"a","age":1')
    assert not person.ended
    assert not person.complete()
    assert person.read("}").ended
    assert person.complete()
    open_end = walk(GrammarSpec("regex", "ab?")).read("a")
    assert open_end.complete()
    assert not open_end.ended
    assert open_end.state.advance(EOS)


def test_a_mask_has_the_tokenizers_width_and_only_real_tokens(
    walk: Callable[[GrammarSpec], Walk], tokenizers: dict[str, Tokenizer]
) -> None:
    size = tokenizers["folder"].vocab_size
    anything = walk(GrammarSpec("regex", "(?s:.*)"))
    assert len(anything.state.mask()) == -(-size // 8)
    # Every byte can begin or go on with a character but those that UTF-8 never has.
    starts = {byte for byte in range(256) if byte < 0x80 or 0xC2 <= byte <= 0xF4}
    assert anything.allowed() == starts | tokenizers["folder"].eos_ids


def test_special_tokens_are_no_text(walk: Callable[[GrammarSpec], Walk]) -> None:
    text = walk(GrammarSpec("regex", r"<\|im_start\|>"))
    assert text.allowed() == {ord("<")}


@pytest.mark.parametrize("name", ["folder", "gguf", "sentencepiece", "without eos"])
def test_any_tokenizer_can_be_held(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    compiler = GrammarCompiler(tokenizer)
    for text in ("abbc", "b"):
        walk = Walk(compiler.compile(GrammarSpec("regex", "ab+c|b")), tokenizer)
        assert walk.spell(text).ended
        assert walk.allowed() == tokenizer.eos_ids
    if name != "without eos":
        choice = Walk(compiler.compile(GrammarSpec("choice", json.dumps(['{"é a": 1}', "a"]))), tokenizer)
        assert choice.spell('{"é a": 1}').ended


BLANKS = ["", " ", "\n", "\n  ", "\n\t\t", "  ", "\n\n", " \n", "\t", "\r", "\n" + " " * 25]


@pytest.mark.parametrize("blank", BLANKS)
def test_white_space_is_free_but_bounded(walk: Callable[[GrammarSpec], Walk], blank: str) -> None:
    may = blank in BLANKS[:5]
    inside = walk(schema({"type": "array", "items": {"type": "integer"}}))
    assert inside.accepts(f"[{blank}1{blank},{blank}2{blank}]") is may
    lark = walk(GrammarSpec("lark", 'start: "x" %json {"type": "array", "items": {"type": "integer"}}'))
    assert lark.accepts(f"x[{blank}1]") is may
    # None before and none after: the end is known at the last bracket.
    if blank:
        assert not walk(schema({})).accepts(f"{blank}[]")
        assert not walk(schema({})).accepts(f"[]{blank}")


# Python leaves DEL as it is; llguidance wants every control character escaped.
JSON_TEXT = st.text(st.characters(exclude_characters="\x7f", exclude_categories=["Cs"]), max_size=6)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**9), 10**9) | JSON_TEXT,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(JSON_TEXT, inner, max_size=3),
        max_leaves=8,
    )
)
def test_json_passes_as_it_is_usually_written(walk: Callable[[GrammarSpec], Walk], value: object) -> None:
    for text in (
        json.dumps(value, ensure_ascii=False),
        json.dumps(value, ensure_ascii=False, indent=2),
        json.dumps(value, ensure_ascii=False, separators=(",", ":")),
    ):
        assert walk(schema({})).accepts(text)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (GrammarSpec("regex", "a("), "regular expression.*unclosed group"),
        (GrammarSpec("regex", "(?=a)b"), "look-around.* is not supported"),
        (GrammarSpec("regex", r"(a)\1"), "backreferences are not supported"),
        (GrammarSpec("lark", "start: foo"), 'line 1: unknown name: "foo"'),
        (GrammarSpec("lark", 'start: "a"\n%%%'), "line 2: lexer error"),
        (GrammarSpec("lark", ""), "no start rule"),
        (GrammarSpec("lark", 'start[temperature=0.5]: "a"'), "`temperature` is not supported"),
        (GrammarSpec("lark", "start: %json 5"), "is not an object"),
        (GrammarSpec("lark", "start: %json x"), "%json is followed by a JSON schema"),
        (GrammarSpec("lark", 'start: "a"\n%llguidance {}'), "`%llguidance` is not supported"),
        (GrammarSpec("lark", 'start: %json {"if": {}}'), '"if" is not supported'),
        (GrammarSpec("lark", 'x: "a"', inside_reasoning=True), "one rule `start`"),
        (GrammarSpec("choice", "[]"), "list of one text at least"),
        (GrammarSpec("choice", '["a", 1]'), "list of one text at least"),
        (GrammarSpec("json_schema", "{"), "JSON schema cannot be used: it is not valid JSON"),
        (GrammarSpec("json_schema", '{"minimum": NaN}'), "NaN is no JSON number"),
        (GrammarSpec("json_schema", "[]"), "not an object"),
        (schema({"if": {}, "then": {}}), '"if", "then" is not supported'),
        (schema({"properties": {"a": {"uniqueItems": True}}}), '"uniqueItems" is not supported'),
        (schema({"x-guidance": {"lenient": True}, "contains": {}}), '"contains" is not supported'),
        (schema({"oneOf": [{}, {}]}), "`oneOf` is not supported unless"),
        (schema({"type": "string", "format": "postcode"}), "[Uu]nknown format: postcode"),
        (schema({"type": "string", "pattern": "("}), "unclosed group"),
        (schema({"type": "thing"}), "Invalid type: thing"),
        (schema({"minimum": 2, "maximum": 1, "type": "integer"}), "no text matches it"),
        (schema(False), "no text matches it"),
        (schema({"$ref": "#"}), "no text matches it"),
        (schema({"$ref": "#/nope"}), "'/nope' does not exist"),
        (
            schema({"$ref": "https://host.invalid/x.json"}),
            r"`\$ref` to https://host.invalid/x.json is not followed",
        ),
        (schema({"$ref": "file:///etc/passwd"}), r"`\$ref` to file:///etc/passwd is not followed"),
    ],
)
def test_what_cannot_be_held_is_an_error_that_says_why(
    compiler: GrammarCompiler, spec: GrammarSpec, message: str
) -> None:
    with pytest.raises(GrammarError, match=message) as caught:
        compiler.compile(spec)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400
    assert ".rs" not in str(caught.value)


def chain(link: str) -> GrammarSpec:
    """As many definitions as fit, each of which refers to the next one."""
    parts, size = ['{"$ref":"#/0"'], 100
    for index in itertools.count():
        parts.append(f'"{index}":{{{link % json.dumps({"$ref": f"#/{index + 1}"})}}}')
        size += len(parts[-1]) + 1
        if size > MAX_TEXT:
            return GrammarSpec("json_schema", ",".join([*parts[:-1], f'"{index}":{{}}}}']))
    raise AssertionError


def rules(line: str, count: int) -> GrammarSpec:
    lines = [line.replace("%", str(i)).replace("$", str(i + 1)) for i in range(count)]
    return GrammarSpec("lark", "\n".join(["start: " + line[0] + "0", *lines, f'{line[0]}{count}: "x"']))


def nested(depth: int) -> dict[str, object]:
    value: dict[str, object] = {"type": "string"}
    for _ in range(depth):
        value = {"anyOf": [value, {"type": "array", "items": value}]}
    return value


HOSTILE = {
    "repetition": GrammarSpec("regex", "x{1,1000000}"),
    "repeated repetition": GrammarSpec("regex", "(((a{1,100}){1,100}){1,100}){1,100}"),
    "nested stars": GrammarSpec("regex", "((a*)*)*b"),
    "backtracker's horror": GrammarSpec("regex", "(a|a)*(a|aa)+(.*a.{500})+"),
    "states": GrammarSpec("regex", "(.*a.{30}b.*c.{30})"),
    "optional parts": GrammarSpec("regex", "a?" * 21_000 + "a" * 21_000),
    "brackets": GrammarSpec("regex", "(" * 30_000 + ")" * 30_000),
    "too long": GrammarSpec("regex", "a" * (MAX_TEXT + 1)),
    "pattern": schema({"type": "string", "pattern": "a?" * 10_000 + "a" * 10_000}),
    "large enum": schema({"enum": [f"value {i}" for i in range(4000)]}),
    "deep": GrammarSpec("json_schema", '{"items":' * 6000 + "{}" + "}" * 6000),
    "doubling": schema(nested(10)),
    "many optional properties": schema(
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}
    ),
    "cross product": schema(
        {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(6)]} for i in range(8)]}
    ),
    "minItems": schema({"type": "array", "minItems": 10**6, "items": {"type": "array", "minItems": 10**6}}),
    "minLength": schema({"type": "string", "minLength": 10**7}),
    "multipleOf": schema({"type": "integer", "multipleOf": 10_000_019}),
    "huge multipleOf": GrammarSpec("json_schema", '{"type":"number","multipleOf":1e300}'),
    "multiples": schema({"anyOf": [{"type": "integer", "multipleOf": 9000 + i} for i in range(300)]}),
    "multiple in lark": GrammarSpec("lark", 'start: %json {"type":"integer","multiple\\u004ff":10000019}'),
    "circle": schema({"$ref": "#/a", "a": {"$ref": "#/b"}, "b": {"$ref": "#/a"}}),
    "binary tree of references": schema(
        {
            "$ref": "#/0",
            **{str(i): {"allOf": [{"$ref": f"#/{i + 1}"}, {"$ref": f"#/{i + 1}"}]} for i in range(30)},
            "30": {},
        }
    ),
    # On a stack of 8 MiB each of these ends the process.
    "chain of references": chain('"items":%s'),
    "chain of choices": chain('"anyOf":[%s]'),
    "chain of unions": chain('"allOf":[%s,{}]'),
    "chain of properties": chain('"properties":{"x":%s}'),
    "chain of rules": rules('a%: a$ "x"', 990),
    "chain of terminals": rules('A%: A$ "x"', 990),
    "chain of stars": rules("A%: (A$)*", 990),
    "chain too long": rules('A%: A$ "x"', 5000),
    "doubling rules": rules("a%: a$ a$", 40),
    "doubling terminals": rules("A%: A$ A$", 40),
    "circle of rules": GrammarSpec("lark", "start: start"),
    "ambiguity": GrammarSpec("lark", 'start: a a a a a\na: "x"* b*\nb: a | "y"'),
    "repeated rules": GrammarSpec("lark", 'start: a{1,100000}\na: b{1,100000}\nb: "x"'),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_grammar_costs_an_error_or_works_in_bounded_time(
    compiler: GrammarCompiler, tokenizers: dict[str, Tokenizer], name: str
) -> None:
    start = time.perf_counter()
    with contextlib.suppress(GrammarError):
        walk = Walk(compiler.compile(HOSTILE[name]), tokenizers["folder"])
        for _ in range(20):
            allowed = walk.allowed() - tokenizers["folder"].eos_ids
            if walk.ended or not allowed:
                break
            walk.ended = walk.state.advance(max(allowed))
    assert time.perf_counter() - start < 5


def test_a_grammar_that_grows_too_complex_on_the_way_says_so(walk: Callable[[GrammarSpec], Walk]) -> None:
    text = walk(HOSTILE["many optional properties"])
    assert text.allowed() == {ord("{")}
    for _ in range(2):  # and stays so
        with pytest.raises(GrammarError, match="too complex"):
            text.read('{"p1":"x"')
    with pytest.raises(GrammarError, match="too complex"):
        text.state.mask()


def test_a_token_that_may_not_come_is_an_error_and_not_taken_in(walk: Callable[[GrammarSpec], Walk]) -> None:
    text = walk(GrammarSpec("regex", "ab"))
    with pytest.raises(GrammarError):
        text.state.advance(ord("b"))


def test_a_grammar_is_compiled_once_and_the_cache_is_bounded(tokenizers: dict[str, Tokenizer]) -> None:
    compiler = GrammarCompiler(tokenizers["folder"])
    specs = [GrammarSpec("regex", f"a{i}") for i in range(MAX_CACHED + 1)]
    first = [compiler.compile(spec) for spec in specs[:-1]]
    assert compiler.compile(GrammarSpec("regex", "a0")) is first[0]
    compiler.compile(specs[-1])
    assert compiler.compile(specs[0]) is first[0], "it was used more recently"
    assert compiler.compile(specs[1]) is not first[1], "the least recently used one made room"
    for kind in ("choice", "lark"):
        with pytest.raises(GrammarError):
            compiler.compile(GrammarSpec(kind, "a0"))


def test_sequences_and_threads_do_not_disturb_each_other(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["folder"]
    compiler = GrammarCompiler(tokenizer)
    specs = [PERSON, NODE, GrammarSpec("regex", "(ab)+"), GrammarSpec("json_object")]
    texts = ['{"name":"a","age":1}', "(()(()))", "abab", '{"a": [1, {"b": null}]}']
    failures: list[object] = []

    def work(turn: int) -> None:
        try:
            for round in range(10):
                index = (turn + round) % len(specs)
                if not Walk(compiler.compile(specs[index]), tokenizer).accepts(texts[index]):
                    failures.append((turn, index))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert threading.stack_size() == 0, "threads started later have their usual stack"


@pytest.mark.alone
def test_the_real_tokenizer_is_held_and_a_mask_takes_microseconds(smollm2_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(read_metadata(smollm2_path))
    compiler = GrammarCompiler(tokenizer)
    walk = Walk(compiler.compile(PERSON), tokenizer)
    times = []
    for token_id in tokenizer.encode('{"name": "Ada", "age": 36, "friends": []}', False):
        start = time.perf_counter()
        mask = walk.state.mask()
        times.append(time.perf_counter() - start)
        assert mask[token_id // 8] >> token_id % 8 & 1
        walk.ended = walk.state.advance(token_id)
    assert walk.ended
    assert walk.complete()
    assert sorted(times)[len(times) // 2] < 0.001
