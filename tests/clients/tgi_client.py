"""The text-generation client 0.7 against a server: URL, then the text that follows "9"."""

import asyncio
import sys

from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError
from text_generation.types import Grammar, GrammarType

url, text = sys.argv[1:]
client = Client(url, timeout=60)

# One answer: the text, its tokens, why it ended
answer = client.generate("9", max_new_tokens=30)
assert answer.generated_text == text
assert answer.details.finish_reason == "eos_token"
assert answer.details.generated_tokens == len(answer.details.tokens)
assert answer.details.seed is None
assert answer.details.prefill == []
assert "".join(token.text for token in answer.details.tokens if not token.special) == text
assert all(token.logprob <= 0 for token in answer.details.tokens)
assert client.generate("9", max_new_tokens=3).details.finish_reason == "length"

# Its options
answer = client.generate(
    "B9",
    max_new_tokens=30,
    stop_sequences=["漢"],
    return_full_text=True,
    decoder_input_details=True,
    top_n_tokens=2,
)
assert answer.generated_text == "B9" + text[: text.index("漢") + 1]
assert answer.details.finish_reason == "stop_sequence"
assert [token.id for token in answer.details.prefill] == list(b"B9")
assert answer.details.prefill[0].logprob is None
assert answer.details.prefill[1].logprob < 0
assert [len(top) for top in answer.details.top_tokens] == [2] * answer.details.generated_tokens
assert client.generate("9", do_sample=True, seed=7).details.seed == 7
assert client.generate("9", temperature=1.5).details.seed is not None  # with the client's do_sample=False
sampled = client.generate(
    "9",
    temperature=2.0,
    top_k=5,
    top_p=0.9,
    typical_p=0.9,
    repetition_penalty=1.1,
    frequency_penalty=0.1,
)
assert sampled.details.seed is not None
assert client.generate("漢漢漢9", truncate=1, max_new_tokens=30).generated_text == text
best = client.generate("9", best_of=2, temperature=1.5)
assert len(best.details.best_of_sequences) == 1
grammar = Grammar(type=GrammarType.Regex, value="[0-9]{3}")
digits = client.generate("9", grammar=grammar).generated_text
assert len(digits) == 3
assert digits.isdigit()
grammar = Grammar(type=GrammarType.Json, value={"type": "object", "properties": {"a": {"type": "boolean"}}})
assert client.generate("9", grammar=grammar, max_new_tokens=60).generated_text.startswith("{")

# Streams
events = list(client.generate_stream("9", max_new_tokens=30, top_n_tokens=1))
assert "".join(event.token.text for event in events if not event.token.special) == text
assert [event.generated_text for event in events] == [None] * (len(events) - 1) + [text]
assert events[-1].details.finish_reason == "eos_token"
assert events[-1].details.generated_tokens == len(events)
assert all(len(event.top_tokens) == 1 for event in events)

# Errors have their classes
for call in (client.generate, lambda *args, **more: list(client.generate_stream(*args, **more))):
    try:
        call("x" * 9000)
    except ValidationError as error:
        assert "`inputs` must have less than" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a prompt that is too long was accepted")


async def talk() -> None:
    client = AsyncClient(url, timeout=60)
    assert (await client.generate("9", max_new_tokens=30)).generated_text == text
    events = [event async for event in client.generate_stream("9", max_new_tokens=30)]
    assert events[-1].generated_text == text


asyncio.run(talk())

# Chat, one answer; the client's streams of it cannot read the `[DONE]` that ends them, TGI's neither
chat = client.chat([{"role": "user", "content": "9"}], max_tokens=5)
assert chat.choices[0].message.role == "assistant"
assert chat.usage["completion_tokens"] <= 5
