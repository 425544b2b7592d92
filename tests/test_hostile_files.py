"""Hostile model files: whatever stands in them, they are served or refused in a sentence, at little cost."""

# Each case goes all the way of a start: files, tokenizer, template, weights, then two tokens if it gets so.
# RIVULET_FUZZ_EXAMPLES=20000 turns the random cases into a search of an hour; its findings are named cases.

import copy
import json
import mmap
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from checkpoints import byte_tokenizer, byte_tokenizer_metadata, make_gguf, make_llama
from harness import ROOT, Drive
from hostile import TINY_FIELDS, entry, field, nothing_large, raw_gguf, safetensors_bytes, string
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import LiveServer

from model.backend import Wishes, choose_backend
from model.errors import ModelError
from model.loader import load_model
from model.weights import open_checkpoint
from model.weights.gguf_header import Header
from server.startup import check_length, read_template, read_tokenizer
from server.text.chat_template import TemplateError
from server.text.library import TokenizerError
from server.text.renderer import Renderer
from server.text.tokenizer import Tokenizer

EXAMPLES = int(os.environ.get("RIVULET_FUZZ_EXAMPLES", "60"))
FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES <= 60,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@cache
def renderer() -> Renderer:
    return Renderer(seconds=0.5)


def use(path: Path) -> None:
    """Start a model as the server does, and let it say two tokens; ModelError if it is refused."""
    checkpoint = open_checkpoint(path)
    tokenizer = read_tokenizer(path, checkpoint)
    template = read_template(tokenizer, path, renderer())
    length = check_length(None, checkpoint.config)
    backend = choose_backend(Wishes(threads=1), checkpoint.config)
    drive = Drive(load_model(checkpoint, backend.ops, length), blocks=4, budget=32, max_running=2)
    try:
        if template is not None:
            template.render([{"role": "user", "content": "hello"}])
        tokenizer.decode(tokenizer.encode("Hello, W\u00f6rld 12 \U0001f642"))
        for token_id in range(min(tokenizer.vocab_size, 300)):
            tokenizer.token_text(token_id)
    except (TemplateError, TokenizerError):
        pass  # a request's error, not the start's
    if length >= 5:  # the server refuses what does not fit
        drive.add("a", [0, 1, 2], max_tokens=2)
        drive.run()


def outcome(path: Path) -> str | None:
    """Use a model within bounds of time and memory; gives its refusal, which must be one sentence."""
    with nothing_large():
        try:
            use(path)
        except ModelError as error:
            text = str(error)
        else:
            return None
    assert "\n" not in text
    assert len(text) < 600
    assert text.isprintable()
    return text


# ---- the files that are changed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A folder in two shards with all that belongs to one."""
    folder = tmp_path_factory.mktemp("good")
    byte_tokenizer(folder)
    make_llama(folder, tie=False, rope_scaling=True, layers=1, shards=2)
    use(folder)  # what a process takes once, torch's threads above all, is none of a hostile file's memory
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("good")
    model = make_llama(folder, tie=True, rope_scaling=True, layers=1)
    metadata = byte_tokenizer_metadata() | {"tokenizer.ggml.merges": ["a b"]}
    metadata["tokenizer.ggml.tokens"][200] = "ab"  # type: ignore[index]
    path = make_gguf(model, folder / "tiny.gguf", kind="Q8_0", metadata=metadata)
    use(path)
    return path.read_bytes()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


class Places(Header):
    """Reads a header as the server does and notes where each number stands."""

    def __init__(self, path: Path) -> None:
        self.numbers: list[tuple[int, int]] = []
        with path.open("rb") as file:
            super().__init__(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def _take(self, size: int) -> int:
        place = super()._take(size)
        if size in (4, 8):
            self.numbers.append((place, size))
        return place

    def _strings(self, count: int) -> list[str]:
        return [self._string() for _ in range(count)]


def test_the_bases_are_good(tmp_path: Path, folder: dict[str, bytes], gguf_file: bytes) -> None:
    assert outcome(write(tmp_path, folder)) is None
    (tmp_path / "good.gguf").write_bytes(gguf_file)
    assert outcome(tmp_path / "good.gguf") is None
    places = Places(tmp_path / "good.gguf")
    places.read()
    assert len(places.numbers) > 300


# ---- named cases: what was thought of, and what the search below has found


def change(name: str, **fields: object) -> Callable[[Path], None]:
    """Set fields of a JSON file."""

    def damage(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(document | fields))

    return damage


def tokenizer(**parts: Any) -> Callable[[Path], None]:
    return change("tokenizer.json", **parts)


def bpe(vocabulary: dict[str, int], merges: list[list[str]], **more: object) -> Callable[[Path], None]:
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges, **more}
    return tokenizer(model=model, added_tokens=[], pre_tokenizer=None, decoder=None)


def pipe(name: str) -> Callable[[Path], None]:
    """Put a pipe in place of a file: whoever opens it waits for ever."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def sparse(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.truncate(1 << 30)

    return damage


def linked(folder: Path) -> None:
    """Make it as the hub's cache is: every file a link to somewhere else."""
    elsewhere = folder.parent / f"{folder.name}-elsewhere"
    elsewhere.mkdir()
    for index, path in enumerate(sorted(folder.iterdir())):
        path.rename(elsewhere / str(index))
        path.symlink_to(elsewhere / str(index))


def twice(folder: Path) -> None:
    """Say a field twice; the last one counts, as everywhere in JSON."""
    path = folder / "config.json"
    path.write_text('{"hidden_size": 5,' + path.read_text().lstrip("{ \n"))


def both(*damages: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


STRIDE = {"max_length": 1, "stride": 5, "strategy": "LongestFirst", "direction": "Right"}
FILL = {"direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
EVIL = {"type": "Split", "pattern": {"Regex": "(o*)*(l*)*$!"}, "behavior": "Isolated", "invert": False}
SERVED = ""
BROKEN = "cannot be used as a tokenizer"
FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a context of 268 million tokens": (
        change("config.json", max_position_embeddings=1 << 28),
        "a context of 268,435,456 tokens needs a rotary table of 16.00 GiB",
    ),
    "a context of 2^62": (change("config.json", max_position_embeddings=1 << 62), "max_position_embeddings"),
    "a billion layers": (change("config.json", num_hidden_layers=10**9), "num_hidden_layers"),
    "more layers than there are": (
        change("config.json", num_hidden_layers=4096),
        "model.layers.1.input_layernorm.weight' is missing, and 36854 more",
    ),
    "a vocabulary of 2^24": (change("config.json", vocab_size=1 << 24), "its config says [16777216, 64]"),
    "a matrix of 2^40": (change("config.json", hidden_size=1 << 20, intermediate_size=1 << 20), "1048576]"),
    "heads that would take it all": (
        change("config.json", num_attention_heads=4096, num_key_value_heads=4096, head_dim=4096),
        "but its config says [16777216, 64]",
    ),
    "no heads": (change("config.json", num_attention_heads=0), "num_attention_heads is 0"),
    "negative heads": (change("config.json", num_key_value_heads=-1), "num_key_value_heads is -1"),
    "no number": (change("config.json", rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "a number beyond all": (change("config.json", rms_norm_eps=10**400), "rms_norm_eps is 1000"),
    "a config of a gigabyte": (sparse("config.json"), "config.json: is larger than any such JSON file"),
    "a tokenizer of a gigabyte": (sparse("tokenizer.json"), "tokenizer.json is larger than 256 MiB"),
    "a template of a gigabyte": (
        both(lambda folder: (folder / "chat_template.jinja").touch(), sparse("chat_template.jinja")),
        "chat_template.jinja is larger than 16 MiB",
    ),
    "a tokenizer that is a pipe": (pipe("tokenizer.json"), "has no tokenizer.json"),
    "links to files elsewhere": (linked, SERVED),
    "a link to nothing": (
        both(linked, lambda folder: (folder / "model-00002-of-00002.safetensors").resolve().unlink()),
        "which is missing",
    ),
    "a field that stands twice": (twice, SERVED),
    "a config that is a pipe": (pipe("config.json"), "has no config.json"),
    "weights that are a pipe": (pipe("model-00001-of-00002.safetensors"), "which is missing"),
    "a template that spins": (
        change("tokenizer_config.json", chat_template="{{ 9 ** (10 ** 9) }}"),
        "The chat template takes more than 0.5 seconds",
    ),
    "a template that does not end": (
        change("tokenizer_config.json", chat_template="{% if"),
        "cannot be read",
    ),
    "a python class for a tokenizer": (change("tokenizer_config.json", tokenizer_class="os.system"), SERVED),
    "a token id of 2^32 - 1": (
        bpe({"a": 2**32 - 1}, []),
        "the tokenizer has 4294967296 tokens, but the model 260",
    ),
    "a token id of 2^32": (bpe({"a": 2**32}, []), BROKEN),
    "a merge of unknown tokens": (bpe({"a": 0}, [["a", "b"]]), BROKEN),
    "a merge that makes no token": (bpe({"a": 0, "b": 1}, [["a", "b"]]), BROKEN),
    "a prefix longer than its tokens": (
        bpe({"a": 0, "b": 1, "ab": 2}, [["a", "b"]], continuing_subword_prefix="#" * 10),
        BROKEN,
    ),
    "an end token of no vocabulary": (change("generation_config.json", eos_token_id=2**70), "eos_token_id"),
    "half a character for a token": (change("tokenizer_config.json", bos_token="\ud800"), BROKEN),
    "an empty charsmap": (
        tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        BROKEN,
    ),
    "a charsmap that points outside": (
        tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}),
        BROKEN,
    ),
    "pieces of no length": (tokenizer(pre_tokenizer={"type": "FixedLength", "length": 0}), BROKEN),
    "a stride beyond the length": (tokenizer(truncation=STRIDE), SERVED),
    "padding to 10^15": (tokenizer(padding={"strategy": {"Fixed": 10**15}, **FILL}), SERVED),
    "a frame of unknown tokens": (
        tokenizer(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "z", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
        BROKEN,
    ),
    "an expression that does not end": (tokenizer(pre_tokenizer=EVIL), SERVED),
    "a version that would colour a terminal": (tokenizer(version="\x1b[31m"), r"\x1b[31m"),
    "an expression that is none": (
        tokenizer(pre_tokenizer={**EVIL, "pattern": {"Regex": "(a"}}),
        "tokenizer.json cannot be used",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_folder(tmp_path: Path, folder: dict[str, bytes], name: str) -> None:
    damage, words = FOLDERS[name]
    damage(write(tmp_path, folder))
    text = outcome(tmp_path)
    assert (text is None) == (words == SERVED), text
    assert text is None or ((words in text and str(tmp_path) in text) or "GiB" in text), text


def strings(*texts: str) -> bytes:
    return struct.pack("<IQ", 8, len(texts)) + b"".join(map(string, texts))


def sentencepiece(*tokens: str) -> list[bytes]:
    return [
        field("tokenizer.ggml.model", 8, string("llama")),
        field("tokenizer.ggml.tokens", 9, strings(*tokens)),
        field(
            "tokenizer.ggml.scores", 9, struct.pack(f"<IQ{len(tokens)}f", 6, len(tokens), *range(len(tokens)))
        ),
    ]


def tiny_gguf(
    *fields: bytes, without: str = "-", tensors: list[bytes] | None = None, data: int = 128
) -> bytes:
    kept = [one for one in TINY_FIELDS if without.encode() not in one]
    return raw_gguf([*kept, *fields], [NORM] if tensors is None else tensors, data=bytes(data))


def number(name: str, value: float, kind: int = 10, code: str = "Q") -> bytes:
    return field(name, kind, struct.pack(f"<{code}", value))


NORM = entry("output_norm.weight", [32])
GGUFS: dict[str, tuple[bytes, str]] = {
    "tokens of a million characters": (
        tiny_gguf(*sentencepiece("a", "a" * 10**6)),
        "hold a token of 1000000 characters",
    ),
    "two tokens of one text": (tiny_gguf(*sentencepiece("a", "a")), "has the same token twice"),
    "more tokens than rows": (tiny_gguf(*sentencepiece(*"abcdefg")), "vocab_size is 4"),
    "an array of bytes that fills the file": (
        tiny_gguf(field("k", 9, struct.pack("<IQ", 0, 1 << 22) + bytes(1 << 22))),
        "tokenizer.ggml.model is missing",
    ),
    "a header beyond what is read": (
        tiny_gguf(*(field(f"k{i}", 8, string(bytes(1 << 24))) for i in range(5))),
        "the end of what is read in metadata field 'k3'",
    ),
    "2^63 tensors": (
        raw_gguf(TINY_FIELDS, [], num_tensors=1 << 63),
        "9223372036854775808 tensors, more than",
    ),
    "an alignment of 2^31": (tiny_gguf(number("general.alignment", 1 << 31, 4, "I")), "no power of two"),
    "arrays in arrays": (
        tiny_gguf(field("k", 9, struct.pack("<IQ", 9, 1) * 1000 + bytes(99))),
        "value type 9, which is unknown or nested",
    ),
    "a name that is long once it is shown": (
        tiny_gguf(field("\U0010ffff" * 200, 99, bytes(8))),
        "value type 99, which is unknown or nested",
    ),
    "rotary factors of a gigabyte": (
        tiny_gguf(tensors=[entry("rope_freqs.weight", [1 << 24])], data=1 << 26),
        "rope_freqs.weight is too large",
    ),
    "no heads": (
        tiny_gguf(number("llama.attention.head_count", 0), without="head_count"),
        "llama.attention.head_count is 0",
    ),
    "-1 heads": (
        tiny_gguf(number("llama.attention.head_count", -1, 11, "q"), without="head_count"),
        "llama.attention.head_count is -1",
    ),
    "a context of 2^62": (
        tiny_gguf(number("llama.context_length", 1 << 62), without="context_length"),
        "llama.context_length is 4611686018427387904",
    ),
    "a billion layers": (
        tiny_gguf(number("llama.block_count", 10**9), without="block_count"),
        "llama.block_count is 1000000000",
    ),
    "a rotary part wider than a head": (
        tiny_gguf(number("llama.rope.dimension_count", 64)),
        "llama.rope.dimension_count is 64",
    ),
    "a base that is no number": (
        tiny_gguf(number("llama.rope.freq_base", float("nan"), 6, "f")),
        "llama.rope.freq_base is nan",
    ),
}


@pytest.mark.parametrize("name", GGUFS)
def test_a_hostile_gguf(tmp_path: Path, name: str) -> None:
    content, words = GGUFS[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    text = outcome(path)
    assert text is not None
    assert words in text


# ---- nothing that a model names is ever run


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def booby_trap(folder: Path, mark: Path) -> None:
    """Let a folder name code of its own in every way that there is."""
    code = f"open({str(mark)!r}, 'w')\n"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "sitecustomize", "conftest"):
        (folder / f"{name}.py").write_text(code)
    auto = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    change("config.json", auto_map=auto, trust_remote_code=True)(folder)
    tokenizer_map = {"AutoTokenizer": ["tokenization_evil.T", None]}
    change("tokenizer_config.json", auto_map=tokenizer_map, tokenizer_class="tokenization_evil.T")(folder)


def test_code_beside_the_weights_is_not_imported(
    tmp_path: Path, folder: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, model = tmp_path / "mark", tmp_path / "model"
    model.mkdir()
    booby_trap(write(model, folder), mark)
    monkeypatch.chdir(model)
    use(Path("."))
    assert not mark.exists()


STARTS = """
import contextlib, io, json, resource, sys, time
from server.cli import main

def start(path):
    began, told = time.process_time(), io.StringIO()
    with contextlib.redirect_stderr(told):
        status = main(["generate", "--model", path, "hello"])
    return status, told.getvalue(), time.process_time() - began

start("/nonexistent/model.gguf")
import server.startup
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
answers = [start(path) for path in sys.argv[1:]]
print(json.dumps([answers, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


def test_the_command_ends_with_status_1_and_one_sentence(tmp_path: Path, folder: dict[str, bytes]) -> None:
    """The worst of the table in a real process: no traceback, little memory, and no pickle is opened."""
    mark = tmp_path / "mark"
    paths = []
    for name in ("a context of 268 million tokens", "a matrix of 2^40", "a config of a gigabyte", "no heads"):
        paths.append(tmp_path / f"folder{len(paths)}")
        paths[-1].mkdir()
        FOLDERS[name][0](write(paths[-1], folder))
    for name in ("2^63 tensors", "a header beyond what is read"):
        paths.append(tmp_path / f"file{len(paths)}.gguf")
        paths[-1].write_bytes(GGUFS[name][0])
    only_pickles = tmp_path / "pickles"
    only_pickles.mkdir()
    write(only_pickles, {name: data for name, data in folder.items() if "safetensors" not in name})
    booby_trap(only_pickles, mark)
    for name in ("pytorch_model.bin", "model.pth", "consolidated.00.pt"):
        (only_pickles / name).write_bytes(pickle.dumps(Touch(mark)))
        paths.append(only_pickles / name)
    paths.append(only_pickles)
    command = [sys.executable, "-c", STARTS, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    answers, grown = json.loads(done.stdout.splitlines()[-1])
    assert len(answers) == len(paths)
    for path, (status, told, seconds) in zip(paths, answers, strict=True):
        assert status == 1, (path, told)
        assert told.strip().startswith("rivulet: ")  # a bar that was begun leaves an empty line
        assert "\n" not in told.strip()
        assert seconds < 2, (path, seconds)
    assert "pickle" in answers[-1][1]
    assert grown < 200 * 1024, f"{grown} KiB"
    assert not mark.exists()


def test_a_text_on_which_a_tokenizer_breaks_is_that_texts_error(
    tmp_path: Path, folder: dict[str, bytes]
) -> None:
    """An expression that backtracks without end: the library gives up in a panic, which is no Exception."""
    expression = {**EVIL, "pattern": {"Regex": "(a+)+$"}}
    tokenizer(pre_tokenizer=expression)(write(tmp_path, folder))
    text = "a" * 40 + "b"
    read = Tokenizer.from_folder(tmp_path)
    for encode in (read.encode, read.encode_with_offsets):
        with pytest.raises(TokenizerError, match="retry-limit-in-match"):
            encode(text)
        assert encode("hello")
    server = LiveServer(tmp_path, dtype="float32")
    with server.client() as client:
        for inputs, status in ((text, 500), ("hello", 200), (text, 500), ("hello", 200)):
            body = {"inputs": inputs, "parameters": {"max_new_tokens": 2}}
            answer = client.post("/generate", json=body)
            assert answer.status_code == status, answer.text
            assert "retry-limit" not in answer.text
    server.wait_until_idle()
    server.stop()


# ---- random damage

EDGES = [0, 1, 2, 3, 7, 31, 33, 255, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40]
EDGES += [2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
POSITIONS = st.integers(0, 1 << 20)
BYTES = st.one_of(
    st.tuples(st.just("flip"), POSITIONS, st.integers(1, 255)),
    st.tuples(st.just("cut"), POSITIONS, st.just(0)),
    st.tuples(st.just("copy"), POSITIONS, POSITIONS),
    st.tuples(st.just("insert"), POSITIONS, st.integers(0, 255)),
)
VALUES = st.one_of(
    st.sampled_from(EDGES),
    st.sampled_from([-1, -(2**63), 2**64, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")]),
    st.sampled_from(
        [None, True, False, "", "a", "\ud800", "\0", "x\ny", "a" * 5000, "../x", [], {}, [[]], {"": 0}]
    ),
    st.integers(-(10**4), 10**6),
    st.text(max_size=4),
    st.sampled_from([6, 60, 600, 20_000]).map(lambda depth: Raw("[" * depth + "]" * depth)),
)
TREE = st.tuples(st.sampled_from(["set", "set", "set", "delete", "double", "move"]), POSITIONS, VALUES)


class Raw(str):
    """JSON that stands for itself."""

    __slots__ = ()


def shift(content: bytes, operation: tuple[str, int, int]) -> bytes:
    """Damage bytes."""
    kind, position, value = operation
    at = position % max(len(content), 1)
    match kind:
        case "flip" if content:
            return content[:at] + bytes([content[at] ^ value]) + content[at + 1 :]
        case "cut":
            return content[:at]
        case "copy":
            other = value % max(len(content), 1)
            return content[:at] + content[other : other + 16] + content[at + 16 :]
        case "insert":
            return content[:at] + bytes([value]) + content[at:]
    return content


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON document: its container and its key there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from spots(inner)


def prune(document: Any, operation: tuple[str, int, Any]) -> None:
    """Damage a document's structure in place."""
    kind, position, value = operation
    # The large tables would hide the rest: the first few of their entries stand for all.
    places = [
        (container, key)
        for container, key in spots(document)
        if len(container) < 50 or _early(container, key)
    ]
    if not places:
        return
    container, key = places[position % len(places)]
    other, other_key = places[(position // 7 + 3) % len(places)]
    match kind:
        case "set":
            container[key] = copy.deepcopy(value)  # or a later one would reach into the next case
        case "delete":
            del container[key]
        case "double" if isinstance(container, list):
            container.append(container[key])
        case "double":
            container[f"{key}2"] = container[key]
        case "move":
            container[key] = copy.deepcopy(other[other_key])


def _early(container: Any, key: Any) -> bool:
    return key < 3 if isinstance(container, list) else key in list(container)[:3]


def dump(document: Any) -> bytes:
    """JSON with the raw parts put in."""
    raws: list[str] = []

    def mark(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(str(value))
            return f"\x00raw{len(raws) - 1}\x00"
        if isinstance(value, dict):
            return {key: mark(inner) for key, inner in value.items()}
        return [mark(inner) for inner in value] if isinstance(value, list) else value

    text = json.dumps(mark(document))
    for index, raw in enumerate(raws):
        text = text.replace(f'"\\u0000raw{index}\\u0000"', raw)
    return text.encode()


@FUZZ
@given(
    numbers=st.lists(st.tuples(POSITIONS, st.sampled_from(EDGES) | st.integers(0, 300)), max_size=3),
    damage=st.lists(BYTES, max_size=2),
)
def test_damaged_gguf(
    tmp_path: Path, gguf_file: bytes, numbers: list[tuple[int, int]], damage: list[tuple[str, int, int]]
) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(gguf_file)
    reader = Places(path)
    reader.read()
    content = bytearray(gguf_file)
    # Most numbers are lengths of tokens: one in two is of the other ones.
    few = [
        place for index, place in enumerate(reader.numbers) if index < 80 or index > len(reader.numbers) - 90
    ]
    for position, value in numbers:
        start, size = (few if position % 2 else reader.numbers)[
            position % (len(few) if position % 2 else len(reader.numbers))
        ]
        content[start : start + size] = (value % 256**size).to_bytes(size, "little")
    header = reader._position
    head = bytes(content[:header])
    for operation in damage:
        head = shift(head, operation)
    path.write_bytes(
        head + bytes(content[header:]) if not any(kind == "cut" for kind, *_ in damage) else head
    )
    outcome(path)


@FUZZ
@given(
    tree=st.lists(TREE, max_size=3),
    length=st.none() | st.sampled_from(EDGES),
    damage=st.lists(BYTES, max_size=2),
)
def test_damaged_safetensors(
    tmp_path: Path,
    folder: dict[str, bytes],
    tree: list[tuple[str, int, Any]],
    length: int | None,
    damage: list[tuple[str, int, int]],
) -> None:
    name = "model-00001-of-00002.safetensors"
    size = struct.unpack_from("<Q", folder[name])[0]
    header = json.loads(folder[name][8 : 8 + size])
    for operation in tree:
        prune(header, operation)
    text = dump(header)
    for operation in damage:
        text = shift(text, operation)
    content = safetensors_bytes(text, folder[name][8 + size :], length)
    outcome(write(tmp_path, folder | {name: content}))


JSON_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


@FUZZ
@given(name=st.sampled_from(JSON_FILES), tree=st.lists(TREE, max_size=3), damage=st.lists(BYTES, max_size=1))
def test_damaged_json(
    tmp_path: Path,
    folder: dict[str, bytes],
    name: str,
    tree: list[tuple[str, int, Any]],
    damage: list[tuple[str, int, int]],
) -> None:
    document = json.loads(folder[name])
    for operation in tree:
        prune(document, operation)
    content = dump(document)
    for operation in damage:
        content = shift(content, operation)
    outcome(write(tmp_path, folder | {name: content}))


# ---- tokenizers that the library reads and then breaks on

PARTS: dict[str, list[Any]] = {
    "normalizer": [
        {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"},
        {"type": "Prepend", "prepend": "x" * 10},
        {"type": "Strip", "strip_left": True, "strip_right": True},
    ],
    "pre_tokenizer": [
        {"type": "FixedLength", "length": 0},
        {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": True},
        {"type": "Metaspace", "replacement": "a", "prepend_scheme": "always", "split": True},
    ],
    "decoder": [
        {"type": "Strip", "content": "a", "start": 2**62, "stop": 3},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"},
        {"type": "Replace", "pattern": {"String": ""}, "content": "b"},
        {"type": "ByteFallback"},
        {"type": "WordPiece", "prefix": "", "cleanup": True},
    ],
    "post_processor": [
        {
            "type": "RobertaProcessing",
            "sep": ["x", 2**32 - 1],
            "cls": ["y", 5],
            "trim_offsets": True,
            "add_prefix_space": True,
        },
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "z", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"z": {"id": "z", "ids": [1, 2**32 - 1], "tokens": ["a"]}},
        },
    ],
    "truncation": [{"max_length": 1, "stride": 5, "strategy": "LongestFirst", "direction": "Right"}],
    "padding": [
        {
            "strategy": {"Fixed": 10**15},
            "direction": "Right",
            "pad_to_multiple_of": 0,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        }
    ],
}
PART = st.sampled_from([(key, value) for key, values in PARTS.items() for value in values])


@FUZZ
@given(parts=st.lists(PART, min_size=1, max_size=2), tree=st.lists(TREE, max_size=2))
def test_damaged_tokenizers(
    tmp_path: Path,
    folder: dict[str, bytes],
    parts: list[tuple[str, Any]],
    tree: list[tuple[str, int, Any]],
) -> None:
    document = json.loads(folder["tokenizer.json"])
    for key, value in parts:
        document[key] = copy.deepcopy(value)
    model = document.pop("model")
    for operation in tree:
        prune(document, operation)
    content = dump({**document, "model": model})
    outcome(write(tmp_path, folder | {"tokenizer.json": content}))
