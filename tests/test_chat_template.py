"""Chat templates render as transformers renders them, inside a sandbox, and bring exactly one BOS."""

import datetime
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import httpx
import pytest
from checkpoints import byte_tokenizer, make_llama, read_metadata
from live import LiveServer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from server import startup
from server.text.chat_template import MAX_VALUE_TEXT, MAX_VALUES, ChatTemplate, TemplateError, opens_reasoning
from server.text.renderer import Renderer
from server.text.tokenizer import Tokenizer
from server.text.tools import ToolStyle

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße & <b>html</b> \"quoted\" 'single' 🙂\n  {{ 7 * 7 }} {% raw %}"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "And 2+2?"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "wetter",
            "description": "Prüft <das> Wetter & mehr",
            "parameters": {"type": "object", "properties": {"ort": {"type": "string"}}},
        },
    }
]
TEMPLATES = {
    "llama3": """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}""",
    "blocks and white space": """{% for m in messages %}
  {% if m.content %}
  {{ m.role }}
  {% endif %}
{% endfor %}
end
""",
    "tools": "{% for t in tools or [] %}{{ t | tojson }}\n{{ t | tojson(indent=4) }}{% endfor %}",
    "json": "{{ messages | tojson(ensure_ascii=True, sort_keys=true, separators=(',', ':')) }}",
    "loop controls": """{% for m in messages %}
{% if m.role == 'system' %}{% continue %}{% endif %}
{% if loop.index > 3 %}{% break %}{% endif %}
{{ m.content }}
{% endfor %}""",
    "namespace": """{% set ns = namespace(found=false) %}
{% for m in messages %}{% if m.role == 'user' %}{% set ns.found = m.content %}{% endif %}{% endfor %}
{{ ns.found }}""",
    "macro": """{% macro show(m) %}[{{ m.role | upper }}: {{ m.content[:5] }}]{% endmacro %}
{% for m in messages %}{{ show(m) }}{% endfor %}""",
    "generation": """{% set x = 1 %}{% for m in messages %}
{% generation %}{% set x = 2 %}{{ m.content }}{{ x }}{% endgeneration %}
{{ x }}{{ eos_token }}{% endfor %}""",
    "absent": "{{ documents is none }}{{ tools is none }}{{ nothing is defined }}[{{ nothing }}]",
    "values": "{% if enable_thinking %}<think>{% endif %}{{ level | default('low') }}",
    "date": "{{ strftime_now('%Y') }}",
}
PLAIN = "{{ messages[0]['content'] }}"
HELLO = [{"role": "user", "content": "hello"}]
ROOT = Path(__file__).resolve().parents[1]


@cache
def renderer() -> Renderer:
    return Renderer()


def chat_template(source: str, bos_token: str, eos_token: str) -> ChatTemplate:
    """A template in processes that the tests share."""
    return ChatTemplate(source, bos_token, eos_token, renderer())


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Backend(models.BPE()), bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_with_transformers(
    name: str, tools: list[dict[str, object]] | None, prompt: bool, reference: PreTrainedTokenizerFast
) -> None:
    theirs = reference.apply_chat_template(
        CHAT,
        tools=tools,
        chat_template=TEMPLATES[name],
        add_generation_prompt=prompt,
        tokenize=False,
        enable_thinking=True,
    )
    template = chat_template(TEMPLATES[name], "<s>", "</s>")
    assert template.render(CHAT, tools, prompt, enable_thinking=True) == theirs
    assert theirs or (name == "tools" and tools is None)


def test_smollm2s_own_template_renders_as_with_transformers(
    smollm2_path: Path, reference: PreTrainedTokenizerFast
) -> None:
    tokenizer = Tokenizer.from_gguf(read_metadata(smollm2_path))
    assert tokenizer.chat_template is not None
    template = chat_template(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)
    for messages in (CHAT, CHAT[1:], CHAT[:1]):
        for prompt in (True, False):
            theirs = reference.apply_chat_template(
                messages,
                chat_template=tokenizer.chat_template,
                add_generation_prompt=prompt,
                tokenize=False,
            )
            assert template.render(messages, add_generation_prompt=prompt) == theirs
    text = template.render(CHAT[3:])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nAnd 2+2?<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert (ids.count(1), ids.count(2)) == (3, 2)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_template_that_writes_bos_brings_exactly_one() -> None:
    backend = Backend(models.BPE({"<s>": 0, **{char: i + 1 for i, char in enumerate("abc ")}}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = Tokenizer(backend, bos_id=0)
    template = chat_template("{{ bos_token }}" + PLAIN, tokenizer.bos_token, tokenizer.eos_token)
    text = template.render([{"role": "user", "content": "abc"}])
    assert text == "<s>abc"
    assert tokenizer.encode(text, add_special_tokens=False) == [0, 1, 2, 3]
    assert tokenizer.encode(text).count(0) == 2  # what the argument is for


def test_the_date_is_todays(monkeypatch: pytest.MonkeyPatch) -> None:
    template = chat_template("{{ strftime_now('%d %b %Y') }}", "", "")
    days = {(datetime.datetime.now() + datetime.timedelta(seconds=s)).strftime("%d %b %Y") for s in (0, 5)}
    assert template.render([]) in days


def test_what_a_user_writes_is_text_and_not_template() -> None:
    message = {"role": "user", "content": "{{ 1 + 1 }}{% for x in range(9) %}{{ raise_exception('no') }}"}
    assert chat_template(PLAIN, "", "").render([message]) == message["content"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError.*not for templates"),
        ("{{ messages.__init__.__globals__ }}", "SecurityError.*not for templates"),
        ("{{ (messages | attr('__class__')).__name__ }}", "SecurityError.*not for templates"),
        ("{{ '{0.__class__.__mro__}'.format(messages) }}", "SecurityError.*not for templates"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "SecurityError.*not for templates"),
        ("{{ strftime_now.__globals__ }}", "SecurityError.*not for templates"),
        ("{% for x in range(10**9) %}{% endfor %}", "OverflowError.*[Rr]ange too big"),
        ("{{ lipsum(10**6) }}", "UndefinedError: 'lipsum' is undefined"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ messages[0].update(role='x') }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "failed: TypeError: no loader"),
        ("{{ nothing.content }}", "UndefinedError: 'nothing' is undefined"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{{ 'a' + messages }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ nothing | tojson }}", "TypeError.*Undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_an_error_of_one_line(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message) as caught:
        chat_template(source, "", "").render([{"role": "user", "content": "hello"}])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_what_a_template_refuses_is_told_in_its_own_words() -> None:
    source = (
        "{{ raise_exception('Conversation roles must alternate\\n user/assistant' ~ messages[0].content) }}"
    )
    with pytest.raises(TemplateError) as caught:
        chat_template(source, "", "").render([{"role": "user", "content": "!" * 10_000}])
    assert str(caught.value).startswith("Conversation roles must alternate user/assistant!!!")
    assert len(str(caught.value)) == 300
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "source", ["{% if %}", "a\n{{ b", "{% nosuchtag %}", "{{ x | nosuchfilter }}", "{% for %}"]
)
def test_a_template_that_cannot_be_read_is_known_when_it_is_loaded(source: str) -> None:
    with pytest.raises(
        TemplateError, match=r"^The chat template cannot be read in line \d+: Template\w*Error: "
    ):
        chat_template(source, "", "")


def test_a_value_cannot_replace_what_the_server_sets() -> None:
    template = chat_template("{{ bos_token }}" + PLAIN + "{{ self_made }}{{ self }}", "<s>", "</s>")
    messages = [{"role": "user", "content": "hi"}]
    for name in ("messages", "bos_token", "eos_token"):
        with pytest.raises(TemplateError, match=re.escape(f"{name} is set by the server")):
            template.render(messages, **{name: "other"})
    assert template.render(messages, self_made="ok").startswith("<s>hiok")
    assert template.render(messages, **{"self": 1, "self_made": ""}).startswith("<s>hi")


def test_rendering_leaves_the_messages_as_they_were() -> None:
    template = chat_template("{% set m = messages[0] %}{{ m.update({'content': 'x'}) }}", "", "")
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(TemplateError):
        template.render(messages)
    assert messages == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tools": []}, "tools is set by the server"),
        ({"add_generation_prompt": False}, "add_generation_prompt is set by the server"),
        ({"raise_exception": "x"}, "raise_exception is set by the server"),
        ({"range": 1}, "range is set by the server"),
        ({"x": object()}, "hold a object"),
        ({"x": (1,)}, "hold a tuple"),
        ({"x": {1: {2}}}, "hold a set"),
        ({"x": {"y": [b""]}}, "hold a bytes"),
        ({"x": 2**64}, "integer beyond 64 bits"),
        ({"x": "a" * (MAX_VALUE_TEXT + 1)}, "too many or too long"),
        ({"x": [None] * MAX_VALUES}, "too many or too long"),
        ({"x": [[None] * (MAX_VALUES // 3)] * 3}, "too many or too long"),
    ],
)
def test_a_value_that_is_not_plain_or_is_taken_is_refused(values: dict[str, object], message: str) -> None:
    template = chat_template(PLAIN, "<s>", "</s>")
    with pytest.raises(TemplateError, match=message):
        template.check_values(values)


def test_plain_values_reach_the_template() -> None:
    template = chat_template("{{ a.b[1] }}{{ c is none }}{{ d }}{{ e + 0.5 }}{{ f }}", "", "")
    values = {"a": {"b": [1, "x"]}, "c": None, "d": True, "e": 1.0, "f": -(2**63)}
    template.check_values(values)
    assert template.render([], **values) == "xTrueTrue1.5-9223372036854775808"


QWEN = """{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}
{%- for m in messages %}
[{{ m.role }}]{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ '\n' }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}
{%- if m.tool_call_id %}({{ m.tool_call_id }}){% endif %}
{%- endfor %}
{%- if add_generation_prompt %}[assistant]<think>
{% endif %}"""


def test_calls_and_their_results_reach_the_template_as_objects() -> None:
    def call(arguments: object) -> dict[str, object]:
        return {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}

    messages: list[dict[str, object]] = [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call('{"x": "\u00e9"}'), call({"y": 1}), call("x")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "12"},
    ]
    before = str(messages)
    text = chat_template(QWEN, "", "").render(messages, TOOLS)
    assert '[assistant]\n<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>' in text
    assert '{"name": "f", "arguments": {"y": 1}}' in text
    assert '{"name": "f", "arguments": "x"}' in text, "what is no object stays as it is"
    assert "[tool]12(c1)" in text
    assert text.startswith('<tools>{"type": "function", "function": {"name": "wetter"')
    assert str(messages) == before, "the caller's messages stay as they are"


@pytest.mark.parametrize(
    ("source", "thinks", "style"),
    [
        (PLAIN, False, None),
        (QWEN, True, ToolStyle.TAGS),
        ("<tool_call> is mentioned, and toolset too", False, None),
        ("{% if tools is not none %}{{ '<|python_tag|>' }}{% endif %}", False, ToolStyle.BARE_JSON),
        (
            '{{ tools }}{{ \'Respond in the format {"name": f, "parameters": {}}\' }}',
            False,
            ToolStyle.BARE_JSON,
        ),
        (
            r"""{{ tools }}{{- '{"name": "' + f + '", ' }}{{- "\"parameters\": " }}""",
            False,
            ToolStyle.BARE_JSON,
        ),
        ("{% if tools %}[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]{% endif %}", False, None),
        ("{{ m.content.split('</think>')[-1] }}{{ '<think>' }}", True, None),
    ],
)
def test_a_template_tells_how_its_model_writes(source: str, thinks: bool, style: ToolStyle | None) -> None:
    template = chat_template(source, "", "")
    assert (template.thinks, template.tool_style) == (thinks, style)


def test_a_prompt_tells_whether_the_answer_begins_inside_reasoning() -> None:
    template = chat_template(QWEN, "", "")
    messages = [{"role": "user", "content": "<think>"}]
    assert opens_reasoning(template.render(messages))
    assert not opens_reasoning(chat_template(PLAIN + "[assistant]", "", "").render(messages))
    assert not opens_reasoning("<think>\n\n</think>\n\n")


# ---- templates that would not end


def runaway(body: str) -> str:
    """A template that goes astray on a certain message, and is good for any other."""
    return "{% if messages[0].content == 'go' %}" + body + "{% endif %}{{ messages[0].content }}"


SPIN = "{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}"
TREE = "{% set n = namespace(x=[1]) %}{% for _ in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
DOUBLING = "{% set n = namespace(x='ab') %}{% for _ in range(60) %}{% set n.x = [LAW] %}{% endfor %}{{ n.x }}"
LONG, LARGE = "takes more than 0.2 seconds", "needs more than 128 MiB"


@pytest.mark.alone
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (SPIN, LONG),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", LONG),
        ("{{ (messages | length + 8) ** (10 ** 9) }}", LONG),
        (
            TREE + "{{ n.x | pprint }}",
            LONG,
        ),
        ("{% for x in 'a' | slice(10 ** 10) %}{% endfor %}", LONG),
        (DOUBLING.replace("[LAW]", "n.x + n.x"), LARGE),
        (DOUBLING.replace("[LAW]", "n.x ~ n.x"), LARGE),
        (DOUBLING.replace("[LAW]", "'{0}{0}'.format(n.x)"), LARGE),
        (DOUBLING.replace("[LAW]", "n.x | replace('a', n.x)"), LARGE),
        (DOUBLING.replace("[LAW]", "[n.x, n.x] | join"), LARGE),
        ("{{ 'a' * (messages | length * 10 ** 10) }}", LARGE),
        ("{{ 'a'.ljust(messages | length * 10 ** 10) }}", LARGE),
        ("{{ '%*d' | format(2 * 10 ** 9, messages | length) }}", LARGE),
        ("{{ messages | tojson(indent=10 ** 10) }}", LARGE),
        ("{{ range(99999) | join('a' * 99999) }}", LARGE),
        ("{{ messages | batch(10 ** 10, 'x') | list }}", LARGE),
        ("{{ 'a' * (9 * 2 ** 20) }}", "writes more than 8,388,608 characters"),
    ],
)
def test_a_template_that_does_not_end_is_ended(body: str, message: str) -> None:
    seconds = 0.2 if message is LONG else 3  # what is ended for its size must come to it on a slow machine
    template = ChatTemplate(runaway(body), "", "", Renderer(seconds=seconds, memory=128 << 20))
    started = time.monotonic()
    with pytest.raises(TemplateError, match=message) as caught:
        template.render([{"role": "user", "content": "go"}])
    assert time.monotonic() - started < 10
    assert "\n" not in str(caught.value)
    assert template.render(HELLO) == "hello"


def test_what_jinja_computes_while_it_reads_is_bounded_too() -> None:
    with pytest.raises(TemplateError, match=LONG):
        ChatTemplate("{{ 9 ** (10 ** 9) }}", "", "", Renderer(seconds=0.2))


def test_a_good_template_does_not_wait_for_a_bad_one() -> None:
    shared = Renderer(seconds=1)
    bad = ChatTemplate(
        "{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}", "", "", shared
    )
    good = ChatTemplate(PLAIN, "", "", shared)
    ended: list[float] = []

    def spin() -> None:
        with pytest.raises(TemplateError):
            bad.render(HELLO)
        ended.append(time.monotonic())

    thread = threading.Thread(target=spin)
    thread.start()
    time.sleep(0.1)
    assert good.render(HELLO) == "hello"
    rendered = time.monotonic()
    thread.join()
    assert rendered < ended[0]


def children() -> set[int]:
    """The processes that this one has started and that are not gone."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that ended just now
            found |= {int(word) for word in (task / "children").read_text().split()}
    return found


def test_processes_are_kept_replaced_and_ended() -> None:
    before = children()
    own = Renderer()
    (first,) = children() - before
    template = ChatTemplate(PLAIN, "", "", own)
    for _ in range(3):
        template.render(HELLO)
    assert children() - before == {first}
    os.kill(first, signal.SIGKILL)
    time.sleep(0.1)
    assert template.render(HELLO) == "hello"
    assert first not in children()
    threads = [threading.Thread(target=template.render, args=(HELLO,)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= len(children() - before) <= 2
    del own, template
    assert not children() - before


ORPHAN = """
from server.text.renderer import Renderer
renderer = Renderer()
print(renderer._idle[0]._process.pid, flush=True)
input()
"""


def test_a_killed_server_leaves_no_process() -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", ORPHAN], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    pid = int(server.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    server.kill()
    server.communicate()
    deadline = time.monotonic() + 20
    while (status := _state(pid)) not in (None, "Z"):
        assert time.monotonic() < deadline, status
        time.sleep(0.02)


def _state(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def test_a_server_outlives_its_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    byte_tokenizer(tmp_path)
    make_llama(tmp_path, tie=True)
    (tmp_path / "chat_template.jinja").write_text(runaway(SPIN))
    monkeypatch.setattr(startup, "Renderer", partial(Renderer, seconds=0.4))
    server = LiveServer(tmp_path, dtype="float32")
    before = children()

    def ask(client: httpx.Client, content: str) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2})

    with server.client() as client:
        statuses: list[int] = []
        threads = [
            threading.Thread(target=lambda: statuses.append(ask(client, "go").status_code)) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        assert client.get("/health").status_code == 200
        assert statuses == []  # the event loop goes on meanwhile
        for thread in threads:
            thread.join()
        assert statuses == [400] * 3
        assert "takes more than 0.4 seconds" in ask(client, "go").json()["error"]["message"]
        assert ask(client, "hello").status_code == 200
    server.wait_until_idle()
    assert len(children()) <= len(before) + 1
    server.stop()
