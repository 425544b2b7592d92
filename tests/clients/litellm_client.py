"""litellm against a server: URL, the model's name, then the text that follows "9"."""

import asyncio
import json
import sys

import litellm

litellm.suppress_debug_info = True
url, model, text = sys.argv[1:]
openai = {"api_base": url + "/v1", "api_key": "none", "num_retries": 0, "timeout": 60}
hello = [{"role": "user", "content": "hi"}]

# Chat
chat = litellm.completion(f"hosted_vllm/{model}", messages=hello, temperature=0, max_tokens=30, **openai)
assert chat.choices[0].message.content == text.strip()
assert chat.choices[0].finish_reason == "stop"
assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
for provider in ("openai", "hosted_vllm"):
    chunks = list(
        litellm.completion(
            f"{provider}/{model}",
            messages=hello,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
            **openai,
        )
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == text.strip(), provider
    whole = litellm.stream_chunk_builder(chunks, messages=hello)
    assert whole.choices[0].message.content == text.strip()
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens == chat.usage.completion_tokens

# Tools and JSON by schema; a model that knows nothing would fill its 512 tokens with the white space between
no_space = {str(byte): -100 for byte in b"\t\n\r "}
tool = {
    "type": "function",
    "function": {
        "name": "pick",
        "parameters": {
            "type": "object",
            "properties": {"yes": {"type": "boolean"}},
            "required": ["yes"],
            "additionalProperties": False,
        },
    },
}
choice = {"type": "function", "function": {"name": "pick"}}
chat = litellm.completion(
    f"openai/{model}",
    messages=hello,
    tools=[tool],
    tool_choice=choice,
    max_tokens=80,
    temperature=0,
    logit_bias=no_space,
    **openai,
)
(call,) = chat.choices[0].message.tool_calls
assert call.function.name == "pick"
assert isinstance(json.loads(call.function.arguments)["yes"], bool)
schema = {"name": "s", "strict": True, "schema": tool["function"]["parameters"]}
chat = litellm.completion(
    f"openai/{model}",
    messages=hello,
    response_format={"type": "json_schema", "json_schema": schema},
    logit_bias=no_space,
    max_tokens=80,
    temperature=0,
    **openai,
)
assert isinstance(json.loads(chat.choices[0].message.content)["yes"], bool)

# Completions
answer = litellm.text_completion(
    model=f"text-completion-openai/{model}", prompt="9", temperature=0, max_tokens=30, **openai
)
assert answer.choices[0].text == text
stream = litellm.text_completion(
    model=f"text-completion-openai/{model}", prompt="9", temperature=0, max_tokens=30, stream=True, **openai
)
assert "".join(chunk.choices[0].text or "" for chunk in stream) == text

# Errors have their classes
for name, temperature, kind in ((model, 9, litellm.BadRequestError), ("other", 0, litellm.NotFoundError)):
    try:
        litellm.completion(f"openai/{name}", messages=hello, temperature=temperature, **openai)
    except kind:
        pass
    else:
        raise AssertionError(f"{name} was accepted at {temperature}")


async def talk() -> None:
    answer = await litellm.acompletion(f"openai/{model}", messages=hello, max_tokens=30, **openai)
    assert answer.choices[0].message.content == text.strip()
    stream = await litellm.acompletion(
        f"openai/{model}", messages=hello, max_tokens=30, stream=True, **openai
    )
    said = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(said) == text.strip()


asyncio.run(talk())
