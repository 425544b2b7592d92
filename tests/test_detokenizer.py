"""A stream adds up to the whole text, never sends half a character and costs the same at every token."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import pytest
from checkpoints import read_metadata
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.text import detokenizer
from server.text.detokenizer import Detokenizer
from server.text.token_bytes import byte_alphabet
from server.text.tokenizer import Tokenizer

# A SentencePiece vocabulary by hand: its words, after three special tokens and the 256 bytes.
WORDS = ["▁", "▁▁", "▁the", "fox", "é", "你", "\ufffd", "\n", "a▁b"]
BYTES, FIRST_WORD = 3, 259
EMOJI = [BYTES + byte for byte in "👩‍👩‍👧🇩🇪".encode()]


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_gguf(read_metadata(smollm2_path))


def sentencepiece(space_prefix: bool) -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    return Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(WORDS)],
            "tokenizer.ggml.scores": [0.0] * len(tokens),
            "tokenizer.ggml.add_space_prefix": space_prefix,
        }
    )


@pytest.fixture(scope="module", params=["smollm2", "prefixed", "unprefixed"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "smollm2":
        found = request.getfixturevalue("smollm2")
        assert isinstance(found, Tokenizer)
        return found
    return sentencepiece(space_prefix=request.param == "prefixed")


def deltas(tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    stream = Detokenizer(tokenizer, prompt)
    return [*(stream.push(i) for i in ids), stream.flush()]


def plain_bytes(token_id: int) -> bytes:
    """What a token of the SentencePiece vocabulary stands for, from the lists above."""
    if token_id < BYTES or token_id >= FIRST_WORD + len(WORDS):
        return b""
    if token_id < FIRST_WORD:
        return bytes([token_id - BYTES])
    return WORDS[token_id - FIRST_WORD].replace("▁", " ").encode()


def token_ids(size: int) -> st.SearchStrategy[list[int]]:
    """Any ids, many of them single bytes, special tokens or just past the vocabulary."""
    return st.lists(st.integers(0, 272) | st.integers(0, size - 1) | st.integers(size, size + 3), max_size=40)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_deltas_add_up_to_the_decoded_text_and_are_never_half_a_character(
    data: st.DataObject, tokenizer: Tokenizer
) -> None:
    ids = data.draw(token_ids(tokenizer.vocab_size))
    parts = deltas(tokenizer, ids)
    whole = tokenizer.decode(ids)
    assert "".join(parts) == whole
    # At each point what was sent is all of the text but a character that is still unfinished: three bytes at
    # most, which are as many U+FFFD if nothing follows (an encoded surrogate, say).
    sent = ""
    for count, part in enumerate(parts[:-1], start=1):
        sent += part
        so_far = tokenizer.decode(ids[:count])
        assert whole.startswith(sent)
        assert sent in {so_far.removesuffix("\ufffd" * held) for held in range(4)}


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_seeded_stream_is_what_the_output_adds_to_the_prompt(
    data: st.DataObject, tokenizer: Tokenizer
) -> None:
    prompt = data.draw(token_ids(tokenizer.vocab_size))
    ids = data.draw(token_ids(tokenizer.vocab_size))
    before = Detokenizer(tokenizer)
    shown = "".join(before.push(i) for i in prompt)
    assert shown + "".join(deltas(tokenizer, ids, prompt)) == tokenizer.decode([*prompt, *ids])


@settings(max_examples=300, deadline=None)
@given(ids=token_ids(FIRST_WORD + len(WORDS)), prefix=st.booleans())
@example(ids=[*EMOJI, BYTES + 0xFF, FIRST_WORD], prefix=True)
@example(ids=[2, FIRST_WORD], prefix=True)
@example(ids=[BYTES + 0x20, BYTES + 0x20], prefix=True)
def test_byte_fallback_text_is_the_utf8_of_the_tokens(ids: list[int], prefix: bool) -> None:
    """Valid text also equals the library's; in invalid text the library spoils the valid characters too."""
    tokenizer = sentencepiece(prefix)
    raw = b"".join(map(plain_bytes, ids))
    if prefix:
        raw = raw.removeprefix(b" ")
    assert tokenizer.decode(ids) == raw.decode("utf-8", "replace")
    try:
        raw.decode()
    except UnicodeDecodeError:
        return
    known = [i for i in ids if i < tokenizer.vocab_size]
    assert tokenizer.decode(ids) == tokenizer._backend.decode(known)


def test_a_character_comes_whole_with_the_token_that_completes_it(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("x🇩🇪é")
    parts = deltas(smollm2, ids)
    assert len(ids) > 4
    assert "".join(parts) == "x🇩🇪é"
    assert all("\ufffd" not in part for part in parts)
    assert [p for p in deltas(sentencepiece(True), EMOJI) if p] == list("👩‍👩‍👧🇩🇪")


def test_special_tokens_have_no_text_and_do_not_cut_a_character(smollm2: Tokenizer) -> None:
    first, *rest = [BYTES + byte for byte in "é".encode()]
    tokenizer = sentencepiece(True)
    assert deltas(tokenizer, [first, 2, *rest, 1]) == ["", "", "é", "", ""]
    assert deltas(smollm2, [2, *smollm2.encode("hi"), 0]) == ["", "hi", "", ""]


def test_only_the_first_word_of_an_unseeded_stream_loses_its_space() -> None:
    tokenizer = sentencepiece(True)
    the = FIRST_WORD + WORDS.index("▁the")
    assert deltas(tokenizer, [the, the]) == ["the", " the", ""]
    assert deltas(tokenizer, [2, the, 2, the]) == ["", "the", "", " the", ""]
    assert deltas(tokenizer, [FIRST_WORD, the]) == ["", " the", ""]
    assert deltas(tokenizer, [the], prompt=[the]) == [" the", ""]
    assert deltas(tokenizer, [the], prompt=[1]) == ["the", ""]
    assert deltas(sentencepiece(False), [the, the]) == [" the", " the", ""]


def test_a_character_that_the_prompt_begins_comes_whole(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("long prompt 🇩")
    assert len(smollm2.token_bytes(ids[-1])) < 4
    assert deltas(smollm2, ids[-1:], prompt=ids[:-1]) == ["🇩", ""]


def test_invalid_bytes_are_sent_as_soon_as_no_token_can_make_them_valid() -> None:
    tokenizer = sentencepiece(False)

    def stream(*raw: int) -> list[str]:
        return deltas(tokenizer, [BYTES + byte for byte in raw])

    assert stream(0x80, 0x80) == ["\ufffd", "\ufffd", ""]
    assert stream(0xF0, 0xF0, 0xF0) == ["", "\ufffd", "\ufffd", "\ufffd"]
    assert stream(0xF0, 0x9F, 0x99, 0x41) == ["", "", "", "\ufffdA", ""]
    assert stream(0xF0, 0x9F, 0x99) == ["", "", "", "\ufffd"]
    replacement = FIRST_WORD + WORDS.index("\ufffd")  # the character itself, which is no error
    assert deltas(tokenizer, [replacement] * 3) == ["\ufffd"] * 3 + [""]


def lines_run(action: Callable[[], object]) -> int:
    """Count the lines of the detokenizer that an action runs: its steps, whatever the machine's speed."""
    count = 0

    def local(frame: FrameType, event: str, argument: object) -> object:
        nonlocal count
        count += event == "line"
        return local

    def trace(frame: FrameType, event: str, argument: object) -> object:
        return local if frame.f_code.co_filename == detokenizer.__file__ else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("kind", ["words", "bytes", "invalid"])
def test_the_cost_of_a_token_does_not_grow(kind: str) -> None:
    tokenizer = sentencepiece(True)
    ids = {"words": [FIRST_WORD + 2] * 1000, "bytes": EMOJI * 30, "invalid": [BYTES + 0xF0] * 1000}[kind]
    deltas(tokenizer, ids)  # the bytes of each token are looked up once
    once, twice = (lines_run(lambda n=n: deltas(tokenizer, ids * n)) for n in (1, 2))
    assert once > len(ids)
    assert twice <= 2 * once
    long_prompt = [FIRST_WORD + 2] * 100_000
    assert lines_run(lambda: Detokenizer(tokenizer, long_prompt)) < 50


def test_the_alphabet_spells_every_byte_once() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert all(char.isprintable() and not char.isspace() for char in alphabet)
    assert (alphabet["Ġ"], alphabet["Ċ"], alphabet["a"]) == (0x20, 0x0A, 0x61)
