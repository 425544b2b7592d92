"""A MiniMind v3 `.pth` behind the wire: template, thinking, tool calls, the tokenizer beside it or named."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import IM_END, VOCAB_SIZE, byte_tokenizer
from harness import ROOT
from live import LiveServer
from minimind import KINDS, Kind, Size, make_state, v3
from test_api_openai import CHAT, post, stream
from test_chat_tools import TOOLS, function, without_ids
from tokenizers import AddedToken, Tokenizer

from model.errors import ModelError
from server.cli import main
from server.config import ModelSettings
from server.startup import read_tokenizer, tokenizer_folder

TEMPLATE = """\
{%- if tools %}<|im_start|>system
# Tools
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
A call is <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>
{% endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {{- "<|im_start|>user\\n<tool_response>\\n" + message.content + "\\n</tool_response><|im_end|>\\n" }}
    {%- else %}
        {{- "<|im_start|>" + message.role + "\\n" }}
        {%- if message.reasoning_content %}
            {{- "<think>\\n" + message.reasoning_content + "\\n</think>\\n\\n" }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- "<tool_call>\\n" + (call.function | tojson) + "\\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n<think>\\n" }}
    {%- if not (open_thinking or enable_thinking) %}
        {{- "\\n</think>\\n\\n" }}
    {%- endif %}
{%- endif %}"""
"""After the description of v3's: thinking stays open, or is written as none."""

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "\n\n")
"""Tokens of their own, and no special ones."""
CALL = ['\n{"name": "weather", ', '"arguments": {"city": "Oslo"}}\n']
HELLO = ["Hel", "lo."]
THOUGHT = ["Hm", "m.\n", "</think>", "<tool_call>", *CALL, "</tool_call>"]
SAID = {"content": "Hello."}
CALLED = {"reasoning_content": "Hmm.", "tool_calls": [function("weather", '{"city": "Oslo"}')]}


def talker(folder: Path) -> tuple[Path, Path]:
    """A v3 that thinks and calls after an open `<think>`, greets after a closed one; and its tokenizer."""
    named = folder / "tokenizer"
    byte_tokenizer(named)
    tokenizer = Tokenizer.from_file(str(named / "tokenizer.json"))
    words = list(dict.fromkeys((*TAGS, *HELLO, *THOUGHT)))
    assert tokenizer.add_tokens([AddedToken(word, special=False) for word in words]) == len(words)
    tokenizer.save(str(named / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (named / "tokenizer_config.json").write_text(json.dumps(config))
    size = Size(hidden=288, layers=1, heads=9, kv_heads=3, width=32, vocab=VOCAB_SIZE + len(words))
    state = make_state(Kind(v3, size, {}, {}))
    # Blocks add nothing: a token's embedding is its own direction, from which the head reads the next token.
    state = {name: torch.full_like(x, float(x.dim() == 1)) for name, x in state.items()}
    successors = dict.fromkeys(range(size.vocab), IM_END)
    for script in (["\n\n", *HELLO], ["\n", *THOUGHT]):
        ids = [ord("\n") if word == "\n" else tokenizer.token_to_id(word) for word in script]
        successors |= dict(itertools.pairwise(ids))
    for token, successor in successors.items():
        state["model.embed_tokens.weight"][token, token] = 1.0
        state["lm_head.weight"][successor, token] = 3.0
    path = folder / "rlhf_288.pth"
    torch.save({name: x.half() for name, x in state.items()}, path)
    return path, named


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture(scope="module")
def server(serve: Callable[..., LiveServer], files: tuple[Path, Path]) -> LiveServer:
    path, named = files
    untied = (("tie_word_embeddings", False),)
    return serve(path, tokenizer=named, config_fields=untied, dtype="float32", max_model_len=4096)


def body(tools: bool, **values: bool) -> dict[str, Any]:
    call = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    return call | {"chat_template_kwargs": values} | ({"tools": TOOLS} if tools else {})


ANSWERS = [
    (body(False), SAID, "stop"),
    (body(True), SAID, "stop"),
    (body(True, open_thinking=False), SAID, "stop"),
    (body(True, open_thinking=True), CALLED, "tool_calls"),
    (body(True, enable_thinking=True), CALLED, "tool_calls"),
    # Without tools what looks like a call is text.
    (
        body(False, open_thinking=True),
        {"reasoning_content": "Hmm.", "content": "".join(["<tool_call>", *CALL, "</tool_call>"])},
        "stop",
    ),
]


@pytest.mark.parametrize(("asked", "said", "reason"), ANSWERS)
def test_thinking_and_calls_are_parts_of_the_message(
    server: LiveServer, asked: dict[str, Any], said: dict[str, Any], reason: str
) -> None:
    (choice,) = post(server, CHAT, **asked)["choices"]
    message = without_ids(choice["message"])
    assert message == {"role": "assistant", "content": None} | said
    assert choice["finish_reason"] == reason


@pytest.mark.parametrize(("asked", "said", "reason"), ANSWERS)
def test_a_stream_adds_up_to_the_same(
    server: LiveServer, asked: dict[str, Any], said: dict[str, Any], reason: str
) -> None:
    parts = [part["choices"][0] for part in stream(server, CHAT, **asked)]
    whole: dict[str, Any] = {}
    for part in parts:
        for name, value in without_ids(part["delta"]).items():
            if name == "tool_calls":
                assert [call.pop("index") for call in value] == [0]
                whole.setdefault(name, []).extend(value)
            elif name != "role" and value:
                whole[name] = whole.get(name, "") + value
    assert whole == said
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [reason]


def test_the_prompt_is_the_templates(server: LiveServer) -> None:
    """An earlier answer's thought and call, and the call's result, come back as the model wrote them."""
    template = server.service.chat_template
    assert template is not None
    call = {"id": "1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "1"},
    ]
    assert template.render(messages, open_thinking=True) == (
        "<|im_start|>user\nWhen?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nHm.\n</think>\n\n"
        '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nnoon\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


def test_its_name_is_the_files(server: LiveServer) -> None:
    with server.client() as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "rlhf_288"


# -- the command line ----------------------------------------------------------------------------------


def test_the_command_reads_a_file_without_torchs_compiler(tmp_path: Path) -> None:
    """A process of its own: `weights_only` needs nothing of what `model/lean.py` leaves out."""
    byte_tokenizer(tmp_path)
    torch.save(make_state(KINDS["v2"], dtype=torch.float16), tmp_path / "full_sft_128.pth")
    options = ["--raw", "--max-tokens", "3", "--config-fields", "num_attention_heads=4"]
    model = [
        "--model",
        str(tmp_path / "full_sft_128.pth"),
        "--kv-cache-tokens",
        "64",
        "--max-model-len",
        "64",
    ]
    command = [sys.executable, "-m", "server", "generate", "hello", *model, *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_what_is_missing_is_told_with_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: tuple[Path, Path]
) -> None:
    torch.save(make_state(KINDS["v2"]), tmp_path / "x.pth")
    heads = ["--config-fields", "num_attention_heads=4"]
    for options, words in (
        ([], "give --config-fields num_attention_heads=..."),
        (heads, "has no tokenizer.json"),
        ([*heads, "--tokenizer", str(tmp_path / "none")], "is no folder that has a tokenizer.json"),
        ([*heads, "--tokenizer", str(files[1])], "the tokenizer has 271 tokens, but the model 260"),
    ):
        assert main(["generate", "hi", "--model", str(tmp_path / "x.pth"), *options]) == 1
        told = capsys.readouterr().err.strip()
        assert words in told and "\n" not in told, told
    assert main(["generate", "hi", "--config-fields", "num_attention_heads"]) == 2
    assert "`num_attention_heads` is not NAME=VALUE" in capsys.readouterr().err


def test_a_tokenizer_that_is_named_wins_and_its_ends_are_added(
    tiny_folder: Path, files: tuple[Path, Path]
) -> None:
    from model.weights import open_checkpoint

    checkpoint = open_checkpoint(tiny_folder)  # ends at EOS and IM_END
    byte_tokenizer(files[1].parent / "plain")
    for named in (files[1].parent / "plain", files[1].parent / "plain" / "tokenizer.json"):
        tokenizer = read_tokenizer(tiny_folder, checkpoint, named)
        assert tokenizer.eos_ids == frozenset(checkpoint.config.eos_token_ids) == {257, IM_END}
    assert read_tokenizer(tiny_folder, checkpoint).eos_ids == tokenizer.eos_ids
    with pytest.raises(ModelError, match="and no such file"):
        tokenizer_folder(tiny_folder / "config.json")
    assert ModelSettings(tokenizer=files[1]).tokenizer == files[1]
