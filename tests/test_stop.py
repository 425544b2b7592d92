"""Stop strings cut a stream exactly where a look at the whole text would, and nothing waits without need."""

import sys
import time
from collections.abc import Callable
from types import FrameType

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.text import stop as stop_module
from server.text.stop import StopMatcher


def rescan(text: str, stops: list[str], keep: bool) -> tuple[str, str | None, str]:
    """Tell by looking at all of it what of a text may be sent, which stop string it has and what waits."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if keep else end - len(longest)], longest, ""
    waiting = 0
    if not keep:
        for stop in stops:
            for length in range(1, len(stop)):
                if text.endswith(stop[:length]):
                    waiting = max(waiting, length)
    return text[: len(text) - waiting], None, text[len(text) - waiting :]


# Two letters make stop strings overlap, nest and begin within one another; the third never matches.
pieces = st.lists(st.text("ab", max_size=5) | st.text("abc", max_size=12), max_size=12)
stops = st.lists(st.text("ab", min_size=1, max_size=6), max_size=4)


@settings(max_examples=1000, deadline=None)
@given(pieces=pieces, stops=stops, keep=st.booleans())
@example(pieces=["ab", "c"], stops=["abcd", "bc"], keep=False)
@example(pieces=["abab", "abb"], stops=["ababb"], keep=False)
@example(pieces=["xaab"], stops=["b", "aab", "ab"], keep=False)
@example(pieces=["aba"], stops=["ba", "aba"], keep=True)
@example(pieces=["abacabaacabaab"], stops=["abacabaab"], keep=False)
def test_a_stream_is_cut_as_a_rescan_of_the_whole_text_would(
    pieces: list[str], stops: list[str], keep: bool
) -> None:
    matcher = StopMatcher(stops, keep)
    sent = text = ""
    for piece in pieces:
        sent += matcher.push(piece)
        text += piece
        expected, matched, _ = rescan(text, stops, keep)
        assert (sent, matcher.matched) == (expected, matched)
    expected, matched, waiting = rescan(text, stops, keep)
    assert matcher.flush() == waiting
    assert matcher.flush() == ""


def test_the_stop_text_is_trimmed_or_kept() -> None:
    for keep, text in ((False, "Hello"), (True, "Hello\nUser:")):
        matcher = StopMatcher(["\nUser:"], keep)
        assert "".join(map(matcher.push, ["Hel", "lo\nUs", "er: what?", " more"])) == text
        assert matcher.matched == "\nUser:"
        assert matcher.flush() == ""


def test_only_what_could_begin_a_stop_string_waits() -> None:
    matcher = StopMatcher(["</end>", "stop"], keep=False)
    assert [matcher.push(piece) for piece in ["a <", "/", "b", " st", "ep s"]] == [
        "a ",
        "",
        "</b",
        " ",
        "step ",
    ]
    assert matcher.flush() == "s"
    assert matcher.matched is None
    kept = StopMatcher(["</end>", "stop"], keep=True)
    assert [kept.push(piece) for piece in ["a <", "/", "b", " st", "ep s"]] == [
        "a <",
        "/",
        "b",
        " st",
        "ep s",
    ]


def test_the_match_that_ends_first_wins_and_then_the_longest() -> None:
    early = StopMatcher(["abcd", "bc"], keep=False)
    assert (early.push("xabcd"), early.matched) == ("xa", "bc")
    longest = StopMatcher(["c", "abc", "bc"], keep=False)
    assert (longest.push("xabc"), longest.matched) == ("x", "abc")


def test_without_stop_strings_everything_passes() -> None:
    matcher = StopMatcher([], keep=False)
    assert [matcher.push("a"), matcher.push(""), matcher.flush(), matcher.matched] == ["a", "", "", None]


def test_an_empty_stop_string_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="empty stop string"):
        StopMatcher(["a", ""], keep=False)


def test_any_characters_may_be_a_stop_string() -> None:
    matcher = StopMatcher(["\U0001f469\u200d\U0001f469", ".*", "\x00"], keep=False)
    assert (matcher.push("a.\U0001f469\u200d"), matcher.push("\U0001f469")) == ("a.", "")
    assert matcher.matched == "\U0001f469\u200d\U0001f469"


def lines_run(action: Callable[[], object]) -> int:
    """Count the lines of the matcher that an action runs: its steps, whatever the machine's speed."""
    count = 0

    def local(frame: FrameType, event: str, argument: object) -> object:
        nonlocal count
        count += event == "line"
        return local

    def trace(frame: FrameType, event: str, argument: object) -> object:
        return local if frame.f_code.co_filename == stop_module.__file__ else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


HARD = {
    "almost": (["a" * 1000 + "b"], "a"),
    "fibonacci": (["abaababaabaababaababaabaababaabaab" * 8 + "c"], "abaababaabaababaababaabaababaabaab"),
    "four": (["a" * 500 + "b", "a" * 300 + "c", "aab", "b" * 900], "ab"),
}


@pytest.mark.parametrize("chunk", [1, 7, 10**9])
@pytest.mark.parametrize("name", HARD)
def test_steps_grow_as_the_text_does(name: str, chunk: int) -> None:
    stops, period = HARD[name]

    def run(length: int) -> None:
        text = (period * length)[:length]
        matcher = StopMatcher(stops, keep=False)
        for start in range(0, length, chunk):
            matcher.push(text[start : start + chunk])
        assert matcher.matched is None

    once, twice, fourfold = (lines_run(lambda n=n: run(n)) for n in (4000, 8000, 16000))
    assert once < 100 * 4000
    # The doubled text costs what the first did, and no more; building the automaton is in both.
    assert fourfold - twice <= 2.05 * (twice - once)


def test_a_stop_string_that_almost_matches_everywhere_costs_no_time() -> None:
    matcher = StopMatcher(["a" * 1000 + "b"], keep=False)
    started = time.perf_counter()
    sent = "".join(matcher.push("aaaa") for _ in range(50_000))
    assert time.perf_counter() - started < 1
    assert len(sent) == 200_000 - 1000
    assert len(matcher.flush()) == 1000
