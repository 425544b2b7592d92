"""A model that thinks, says something and calls a tool, the same in every answer."""

import json
from pathlib import Path

from checkpoints import BOS
from wire import script_llama

THOUGHT, SAID = "Wy", "Oz"
ARGUMENTS = '{"a": 1}'
CALL = f'<tool_call>\n{{"name": "f", "arguments": {ARGUMENTS}}}\n</tool_call>'
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% else %}<tool_call>{% endif %}"
)


def agent_llama(folder: Path) -> None:
    """Save it: every byte is a token and so is the whole call; `enable_thinking` false ends the thinking."""
    script_llama(folder, (*f"\n{THOUGHT}</think>{SAID}".encode(), BOS))
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    (token,) = (token for token in tokenizer["added_tokens"] if token["id"] == BOS)
    token |= {"content": CALL, "special": False}
    path.write_text(json.dumps(tokenizer))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["bos_token"]
    path.write_text(json.dumps(config | {"chat_template": TEMPLATE}))
