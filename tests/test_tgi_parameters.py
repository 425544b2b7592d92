"""Every parameter of TGI's native routes: what it does at its bounds, and what is refused beyond them."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from checkpoints import EOS, IM_START
from live import LiveServer
from wire import JSON, close, native_events, without_id

from server.routes.tgi_schema import NEUTRAL, Parameters

TEXT = "\nA😎é漢. BCD"
"""What the script model says after "9"; every byte is a token."""


@pytest.fixture(scope="module")
def client(tiny_server: LiveServer) -> Iterator[httpx.Client]:
    with tiny_server.client() as client:
        yield client


@pytest.fixture(scope="module")
def script(script_server: LiveServer) -> Iterator[httpx.Client]:
    with script_server.client() as client:
        yield client


def post(client: httpx.Client, inputs: str, path: str = "/generate", **parameters: object) -> Any:
    """The JSON of an answer, with details."""
    body = {"inputs": inputs, "parameters": {"details": True} | parameters}
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def both(client: httpx.Client, inputs: str, **parameters: object) -> dict[str, Any]:
    """An answer, which the stream must give too."""
    answer = post(client, inputs, **parameters)
    body = {"inputs": inputs, "parameters": {"details": True} | parameters}
    events = native_events(client.post("/generate_stream", json=body).text)
    assert events[-1]["generated_text"] == answer["generated_text"]
    assert [event["token"]["id"] for event in events] == [t["id"] for t in answer["details"]["tokens"]]
    for key in ("finish_reason", "generated_tokens", "seed"):
        assert events[-1]["details"][key] == answer["details"][key]
    return dict(answer)


def refuse(client: httpx.Client, body: str | dict[str, Any], path: str = "/generate") -> str:
    """The text of a validation error in TGI's form."""
    content = body if isinstance(body, str) else json.dumps(body)
    answer = client.post(path, content=content, headers=JSON)
    assert answer.status_code == 422, (body, answer.text)
    assert answer.headers["content-type"] == "application/json"
    error = without_id(answer.json(), answer)
    assert list(error) == ["error", "error_type"]
    assert error["error_type"] == "validation"
    message: str = error["error"]
    assert message.startswith("Input validation error: ")
    return message.removeprefix("Input validation error: ")


# Beyond the bounds: one table, each field with each kind of wrong value, as raw JSON.

HUGE = "1" + "0" * 400
NUMBER = ('"1"', "true", "[]", "{}", "NaN", "Infinity", "-Infinity", "1e999")
INTEGER = (*NUMBER, "1.5")
SWITCH = ('"true"', "1", "0", "[]", "{}", "NaN", "1e999", "null")
LIST = ('"a"', "5", "{}", "true", "NaN", "1e999")
BAD: dict[str, tuple[str, ...]] = {
    "best_of": (*INTEGER, "0", "-1", "3", HUGE),
    "temperature": (*NUMBER, "-0.1", f"-{HUGE}"),
    "repetition_penalty": (*NUMBER, "0", "-1", f"-{HUGE}"),
    "frequency_penalty": (*NUMBER, "-2.01", "2.01", HUGE),
    "presence_penalty": (*NUMBER, "-2.01", "2.01", HUGE),
    "logit_bias": (
        *('"1"', "5", "[]", "true", "NaN", "1e999"),
        *('{"1": "1"}', '{"1": true}', '{"1": null}', '{"1": NaN}', '{"1": Infinity}', '{"1": 1e999}'),
        *('{"1": 100.1}', '{"1": -100.1}', f'{{"1": {HUGE}}}', '{"1": [1]}'),
        *('{"260": 1}', '{"-1": 1}', '{"a": 1}', '{"": 1}', '{"1.0": 1}', '{"²": 1}', '{"1": 1, "01": 1}'),
        f'{{"{HUGE}": 1}}',
        json.dumps({str(key): 0 for key in range(100_000)}),
    ),
    "top_k": (*INTEGER, "0", "-1", f"-{HUGE}"),
    "top_p": (*NUMBER, "0", "-0.1", "1.1", HUGE),
    "typical_p": (*NUMBER, "0", "-0.1", "1.1", HUGE),
    "min_p": (*NUMBER, "-0.1", "1.1", HUGE),
    "do_sample": SWITCH[:-1],
    "max_new_tokens": (*INTEGER, "0", "-1", "512", HUGE),
    "min_new_tokens": (*INTEGER, "-1", "512", HUGE),
    "min_tokens": (*INTEGER, "-1", "512", HUGE),
    "return_full_text": SWITCH[:-1],
    "stop": (*LIST, "null", "[5]", "[null]", '[""]', '["a", "\\ud800"]', json.dumps(["a"] * 5)),
    "stop_token_ids": (*LIST, '["1"]', "[1.5]", "[true]", "[null]", "[-1]", "[260]", f"[{HUGE}]"),
    "ignore_eos": SWITCH,
    "truncate": (*INTEGER, "0", "-1", "512", HUGE),
    "watermark": ("true", '"a"', "1", "0", "[]", "{}", "NaN", "1e999"),
    "details": SWITCH,
    "decoder_input_details": SWITCH,
    "seed": (*INTEGER, "-1", "18446744073709551616", HUGE),
    "top_n_tokens": (*INTEGER, "-1", "6", HUGE),
    "grammar": (
        *('"json"', "5", "[]", "{}", "true", "NaN", "1e999"),
        *('{"type": "lark", "value": "a"}', '{"type": 5, "value": "a"}', '{"value": "a"}'),
        *('{"type": "regex"}', '{"type": "regex", "value": null}', '{"type": "regex", "value": 5}'),
        *('{"type": "regex", "value": "("}', '{"type": "regex", "value": "\\ud800"}'),
        *(
            '{"type": "json", "value": "{"}',
            '{"type": "json", "value": "5"}',
            '{"type": "json", "value": []}',
        ),
        *('{"type": "json", "value": {"minimum": NaN}}', '{"type": "json", "value": {"a": "\\ud800"}}'),
        *('{"type": "json_object", "value": true}', '{"type": "json", "value": {"type": "nothing"}}'),
        *('{"type": "json_schema", "value": {"properties": {}}}', '{"type": "json_schema"}'),
        json.dumps({"type": "regex", "value": "(a|b)" * 20_000}),
        '{"type": "json", "value": ' + '{"items": ' * 50 + "1" + "}" * 50 + "}",  # deeper: test_edge.py
    ),
    "adapter_id": ('"x"', '""', "5", "true", "[]", "{}", "NaN", "1e999"),
}
"""Field -> values that no call may have."""
LISTS = ("stop", "stop_token_ids")


def test_every_parameter_is_tried_with_bad_values() -> None:
    assert BAD.keys() == Parameters.model_fields.keys()


@pytest.mark.parametrize("field", BAD)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_bad_value_is_refused_by_name_before_the_first_byte(
    client: httpx.Client, path: str, field: str
) -> None:
    values = [*BAD[field]]
    if field in LISTS:
        values += [f"[{', '.join([one] * 100_000)}]" for one in ('"a"', "1", "5.5")]
    for value in values:
        message = refuse(client, f'{{"inputs": "a", "parameters": {{"{field}": {value}}}}}', path)
        assert re.search(rf"\b{field}\b", message), (value[:50], message)
        assert len(message) < 500, "an error does not repeat what was sent"


INPUTS = ("null", "5", "true", "[]", "{}", '["a"]', "NaN", "1e999", HUGE, '""', '"\\ud800"')


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
def test_bad_inputs_are_refused_by_name(client: httpx.Client, path: str) -> None:
    for value in INPUTS:
        assert "`inputs`" in refuse(client, f'{{"inputs": {value}}}', path)
    assert "`inputs`" in refuse(client, "{}", path)
    for value in ("5", "[]", '"a"', "true", "NaN"):
        assert "`parameters`" in refuse(client, f'{{"inputs": "a", "parameters": {value}}}', path)


@pytest.mark.parametrize("value", [*SWITCH[:-1], "null"])
def test_a_bad_stream_switch_is_refused_by_name(client: httpx.Client, value: str) -> None:
    assert "`stream`" in refuse(client, f'{{"inputs": "a", "stream": {value}}}', "/")


NULLABLE = BAD.keys() - {"stop", "ignore_eos", "details", "decoder_input_details"}


@pytest.mark.parametrize("field", sorted(NULLABLE))
def test_null_is_as_if_it_were_not_there(client: httpx.Client, field: str) -> None:
    base = {"max_new_tokens": 4} if field != "max_new_tokens" else {"stop": [" "]}
    assert post(client, "abc", **base) == post(client, "abc", **base | {field: None})


GOOD: dict[str, list[Any]] = {
    "best_of": [1],
    "temperature": [0, 0.01, 100, 10**300],
    "repetition_penalty": [0.01, 10**300],
    "frequency_penalty": [-2, 2],
    "presence_penalty": [-2, 2],
    "logit_bias": [{}, {"0": -100, "259": 100.0}, {str(key): 0 for key in range(260)}],
    "top_k": [1, 260, 10**30],
    "top_p": [1e-9, 1, 1.0],
    "typical_p": [1e-9, 1, 1.0],
    "min_p": [0, 1],
    "max_new_tokens": [1],
    "min_new_tokens": [0, 2],
    "min_tokens": [0, 2],
    "stop": [[], ["a", "b", "c", "d"]],
    "stop_token_ids": [[], [0], [259] * 64],
    "truncate": [1, 511],
    "watermark": [False],
    "seed": [0, 2**64 - 1],
    "top_n_tokens": [0, 5],
}
"""Field -> values at its bounds."""


@pytest.mark.parametrize("field", GOOD)
def test_the_bounds_themselves_are_served(client: httpx.Client, field: str) -> None:
    for value in GOOD[field]:
        both(client, "abc", **{"seed": 1, "max_new_tokens": 2} | {field: value})


# TGI's words (contracts 2.3); those that need no more than one parameter stand in test_bad_input.py.

RULES: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 0}, "`best_of` must be > 0 and <= 2. Given: 0"),
    ({"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"best_of": 2, "temperature": 0}, "you must use sampling when `best_of` is > 1"),
    ({"best_of": 2, "do_sample": False, "temperature": 1}, "you must use sampling when `best_of` is > 1"),
    ({"best_of": 2, "top_k": 5, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    ({"typical_p": 0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 1.01}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"watermark": True}, "`watermark` is not supported"),
    ({"adapter_id": "x"}, "`adapter_id` names no adapter of this server. Loaded: none"),
    ({"min_tokens": 1, "min_new_tokens": 1}, "give `min_new_tokens` or `min_tokens`, not both"),
    (
        {"min_new_tokens": 6, "max_new_tokens": 5},
        "`min_new_tokens` must be >= 0 and <= `max_new_tokens` (5). Given: 6",
    ),
    ({"min_tokens": 509}, "`min_tokens` must be >= 0 and <= `max_new_tokens` (508). Given: 509"),
    ({"stop_token_ids": [260]}, "`stop_token_ids` must be at least 0 and below 260"),
    (
        {"grammar": {"type": "regex", "value": 5}},
        "grammar is not valid: the value of a regex must be a string",
    ),
    ({"grammar": {"type": "json", "value": "{"}}, "grammar is not valid: the schema is not valid JSON"),
    ({"grammar": {"type": "json", "value": []}}, "grammar is not valid: the schema must be an object"),
    (
        {"grammar": {"type": "json_schema", "value": {"name": "x"}}},
        "grammar is not valid: the value of a json_schema must be an object with a `schema`",
    ),
]


@pytest.mark.parametrize(("parameters", "message"), RULES, ids=lambda v: str(v)[:50])
def test_the_words_of_a_refusal(client: httpx.Client, parameters: dict[str, Any], message: str) -> None:
    for path in ("/generate", "/"):
        assert refuse(client, {"inputs": "four", "parameters": parameters}, path) == message


@pytest.mark.parametrize("best_of", [0, 2, 3])
def test_a_stream_has_one_candidate(client: httpx.Client, best_of: int) -> None:
    body = {"inputs": "a", "parameters": {"best_of": best_of, "do_sample": True}}
    message = "`best_of` != 1 is not supported when streaming tokens"
    assert refuse(client, body, "/generate_stream") == message
    assert refuse(client, body | {"stream": True}, "/") == message


def test_the_limits_are_settings(serve: Callable[..., LiveServer], tiny_folder: Path) -> None:
    server = serve(tiny_folder, dtype="float32", max_best_of=1, max_stop_sequences=6, max_top_n_tokens=0)
    with server.client() as client:
        body = {"inputs": "a", "parameters": {"best_of": 2, "do_sample": True}}
        assert refuse(client, body) == "`best_of` != 1 is not allowed for this endpoint"
        both(client, "a", max_new_tokens=1, best_of=1, stop=["no"] * 6, top_n_tokens=0)
        body = {"inputs": "a", "parameters": {"stop": ["no"] * 7}}
        assert refuse(client, body) == "`stop` supports up to 6 stop sequences. Given: 7"
        body = {"inputs": "a", "parameters": {"top_n_tokens": 1}}
        assert refuse(client, body) == "`top_n_tokens` must be >= 0 and <= 0. Given: 1"
        info = client.get("/info").json()
    assert (info["max_best_of"], info["max_stop_sequences"], info["max_top_n_tokens"]) == (1, 6, 0)


# best_of

BEST = {"best_of": 2, "do_sample": True, "max_new_tokens": 12, "ignore_eos": True}


def mean(details: dict[str, Any]) -> float:
    """Log-probability per token."""
    return sum(token["logprob"] for token in details["tokens"]) / len(details["tokens"])


@pytest.fixture(scope="module")
def eight(serve: Callable[..., LiveServer], tiny_folder: Path) -> LiveServer:
    """A server that lets a call have eight candidates."""
    return serve(tiny_folder, dtype="float32", max_best_of=8)


def test_best_of_gives_the_likeliest_and_tells_the_others(eight: LiveServer) -> None:
    keys = ["finish_reason", "generated_tokens", "seed", "prefill", "tokens"]
    with eight.client() as client:
        places = set()
        for _ in range(6):
            answer = post(client, "abc", **BEST | {"best_of": 8}, top_n_tokens=2)
            details, others = answer["details"], answer["details"]["best_of_sequences"]
            assert list(details) == [*keys, "best_of_sequences", "top_tokens"]
            assert all(list(other) == ["generated_text", *keys, "top_tokens"] for other in others)
            assert len(others) == 7
            assert mean(details) >= max(map(mean, others))
            seeds = sorted([details["seed"], *(other["seed"] for other in others)])
            assert seeds == list(range(seeds[0], seeds[0] + 8))
            places.add(seeds.index(details["seed"]))
            texts = {answer["generated_text"], *(other["generated_text"] for other in others)}
            assert len(texts) > 1
            # Each seed alone makes its candidate again.
            for text, told in ((answer["generated_text"], details), (others[0]["generated_text"], others[0])):
                alone = post(client, "abc", **BEST | {"best_of": 1, "seed": told["seed"]})
                assert alone["generated_text"] == text
                assert alone["details"]["generated_tokens"] == told["generated_tokens"] == 12
        assert len(places) > 1, "the best is not always the first"


def test_best_of_compares_by_the_mean(eight: LiveServer) -> None:
    """A sum would favour whatever ends first."""
    longer = 0
    with eight.client() as client:
        for _ in range(10):
            bias = {str(EOS): 6.0}
            details = post(client, "abc", best_of=8, do_sample=True, logit_bias=bias, max_new_tokens=40)[
                "details"
            ]
            others = details["best_of_sequences"]
            assert mean(details) >= max(map(mean, others))
            sums = [sum(token["logprob"] for token in told["tokens"]) for told in (details, *others)]
            longer += sums[0] < max(sums)
    assert longer > 0


def test_best_of_without_details_is_the_text_alone(client: httpx.Client) -> None:
    answer = post(client, "abc", **BEST, details=False)
    assert list(answer) == ["generated_text"]
    (answer,) = post(client, "abc", "/", **BEST)
    assert answer["generated_text"].startswith("abc")
    assert answer["details"]["best_of_sequences"][0]["generated_text"].startswith("abc")
    assert "best_of_sequences" not in post(client, "abc", **BEST | {"best_of": 1})["details"]


def test_every_candidate_tells_the_prompt(client: httpx.Client) -> None:
    details = post(client, "abc", **BEST, decoder_input_details=True, details=False)["details"]
    alone = post(client, "abc", max_new_tokens=1, decoder_input_details=True)["details"]
    assert len(alone["prefill"]) == 3
    for told in (details, details["best_of_sequences"][0]):
        assert [token["id"] for token in told["prefill"]] == list(b"abc")
        assert close(told["prefill"], alone["prefill"])


# What ends a text, and what may not end it.


@pytest.mark.parametrize(
    ("ids", "text", "reason"),
    [
        ([ord(".")], "\nA😎é漢.", "stop_sequence"),
        ([ord("C"), ord("B")], "\nA😎é漢. B", "stop_sequence"),
        ([ord("Q")], TEXT, "eos_token"),
        ([EOS], TEXT, None),
        ([0xF0], "\nA\ufffd", "stop_sequence"),
    ],
)
def test_a_stop_token_ends_the_text_and_stays_in_it(
    script: httpx.Client, ids: list[int], text: str, reason: str | None
) -> None:
    answer = both(script, "9", stop_token_ids=ids)
    assert answer["generated_text"] == text
    if reason is not None:
        assert answer["details"]["finish_reason"] == reason


def test_a_special_stop_token_has_no_text(script: httpx.Client) -> None:
    answer = both(script, "u", stop_token_ids=[IM_START])
    assert answer["generated_text"] == ""
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert answer["details"]["tokens"][-1]["text"] == "<|im_start|>"


def test_a_named_eos_ends_though_eos_is_ignored(script: httpx.Client) -> None:
    answer = both(script, "9", stop_token_ids=[EOS], ignore_eos=True, max_new_tokens=40)
    assert answer["generated_text"] == TEXT
    assert answer["details"]["finish_reason"] == "stop_sequence"


@pytest.mark.parametrize("name", ["min_tokens", "min_new_tokens"])
def test_the_least_number_of_tokens(script: httpx.Client, name: str) -> None:
    assert both(script, "8")["details"]["generated_tokens"] == 1  # EOS at once
    answer = both(script, "8", **{name: 3, "max_new_tokens": 30})
    ids = [token["id"] for token in answer["details"]["tokens"]]
    assert len(ids) > 3
    assert EOS not in ids[:3]
    for value in (0, 16):  # EOS is the 17th
        assert both(script, "9", **{name: value})["generated_text"] == TEXT
    assert both(script, "9", **{name: 17, "max_new_tokens": 30})["generated_text"] != TEXT
    stopped = both(script, "9", **{name: 3, "stop_token_ids": [ord("A")]})
    assert ord("A") not in [token["id"] for token in stopped["details"]["tokens"]][:3]


def test_a_bias_forces_and_forbids(script: httpx.Client) -> None:
    forced = both(script, "9", logit_bias={str(ord("q")): 100}, max_new_tokens=5)
    assert forced["generated_text"] == "qqqqq"
    forbidden = both(script, "9", logit_bias={str(ord("\n")): -100}, max_new_tokens=1)
    assert forbidden["details"]["tokens"][0]["id"] != ord("\n")
    assert both(script, "9", logit_bias={str(ord("q")): 0.5})["generated_text"] == TEXT


def test_logprobs_are_those_of_the_model(script: httpx.Client) -> None:
    """Not of what penalties, temperature, cuts and masks made of it."""
    plain = both(script, "9", max_new_tokens=1)["details"]["tokens"][0]
    for changes in (
        {"temperature": 0.2, "seed": 1},
        {"top_k": 1, "seed": 1},
        {"typical_p": 0.2, "seed": 1},
        {"logit_bias": {str(ord("\n")): 50}},
        {"min_new_tokens": 1},
    ):
        token = both(script, "9", max_new_tokens=1, **changes)["details"]["tokens"][0]
        assert token == plain, changes


# Grammars

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 3}, "age": {"enum": [7, 8]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "json", "value": PERSON},
        {"type": "json_object", "value": PERSON},
        {"type": "json", "value": json.dumps(PERSON)},
        {"type": "json_schema", "value": {"name": "person", "schema": PERSON, "strict": True}},
    ],
    ids=lambda grammar: f"{grammar['type']} {type(grammar['value']).__name__}",
)
def test_a_schema_is_kept(client: httpx.Client, grammar: dict[str, Any]) -> None:
    answer = both(client, "abc", grammar=grammar, do_sample=True, seed=3, temperature=2.0)
    person = json.loads(answer["generated_text"])
    assert list(person) == ["name", "age"]
    assert len(person["name"]) <= 3
    assert person["age"] in (7, 8)
    assert answer["details"]["finish_reason"] in ("eos_token", "stop_sequence")


def test_an_expression_is_kept(client: httpx.Client) -> None:
    grammar = {"type": "regex", "value": "(x[0-9]){3}!"}
    texts = set()
    for seed in range(4):
        answer = both(client, "abc", grammar=grammar, seed=seed, temperature=2.0)
        assert re.fullmatch(r"(x[0-9]){3}!", answer["generated_text"])
        texts.add(answer["generated_text"])
    assert len(texts) > 1


def test_each_candidate_follows_the_grammar_by_itself(client: httpx.Client) -> None:
    grammar = {"type": "regex", "value": "[ab]{6}"}
    details = post(client, "abc", best_of=2, temperature=2.0, grammar=grammar, max_new_tokens=20)["details"]
    for told in (details, *details["best_of_sequences"]):
        text = "".join(token["text"] for token in told["tokens"] if not token["special"])
        assert re.fullmatch("[ab]{6}", text)


def test_what_the_compiler_refuses_is_told(client: httpx.Client) -> None:
    body = {"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": "(a"}}}
    assert refuse(client, body).startswith("grammar is not valid: ")
    assert refuse(client, body, "/generate_stream").startswith("grammar is not valid: ")


def test_refused_names_stay_known() -> None:
    """A field that becomes supported must leave the list of those that are refused."""
    assert NEUTRAL.keys() == {"watermark"}
