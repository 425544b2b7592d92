"""Token ids equal to the reference's: transformers, the tokenizer that a GGUF was made from, plain Python."""

import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import regex
import transformers
from checkpoints import read_metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend

from model.errors import ModelError
from server.text import tokenizer as tokenizer_module
from server.text.gguf_tokenizer import PRE_TOKENIZERS, merges_from_scores
from server.text.tokenizer import Tokenizer

CORPUS = {
    "empty": "",
    "english": "The quick brown fox doesn't jump over the lazy dog; it's we'll, I'D, THEY'RE!",
    "code": "def f(x: int) -> int:\n    if x == 0:\n        return 1\n\treturn x * f(x - 1)  # 100%\r\n\r\n",
    "cjk": "你好\uff0c世界。日本語のテキストと한국어 문장も混ぜる。",
    "emoji": "👩‍👩‍👧‍👦 🇩🇪🇫🇷 👍🏽 ❤️ 🏳️‍🌈 a🙂b",
    "spaces": "  leading, a    run, " + " " * 70 + "and trailing   ",
    "blank": " \t\n \n\n\t\t \r\n   ",
    "numbers": "1 22 333 4444 55555 3.14159 1,000,000 0x1F ٣٤٥ Ⅷ ½ 2²",
    "nfc": "Crème brûlée, Ångström, naïve, Übergröße, Việt Nam",
    "nfd": "Cre\u0301me bru\u0302le\u0301e, A\u030angstro\u0308m, Vie\u0323\u0302t Nam",
    "long": "pneumonoultramicroscopicsilicovolcanoconiosis" * 12,
    "symbols": "a_b$c^d~e|f`g=h<i>j+k @#%& “quotes” \u2013 — … €5 £6 +-*/ ()[]{}\\",
    "controls": "nul \x00 bell \x07 nbsp \xa0 zwsp \u200b bom \ufeff replacement \ufffd last \U0010ffff",
    "case": "camelCaseWord parseJSON HTTPServer a/b/c //\n/* x */ 'tis o'clock",
    "specials": "<s>system\nYou<|end|></s> <s> x<|end|>y<think> z </think></s>",
    "almost": "<s <|end |> < s> </s<|end|>",
}
TRAINING = list(CORPUS.values()) * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]

# Typed here as the models' own tokenizer.json files have them, not taken from the code under test.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_level(pre: pre_tokenizers.PreTokenizer, nfc: bool = False, ignore_merges: bool = False) -> Backend:
    """Train a byte-level BPE tokenizer as the model families have it."""
    backend = Backend(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre
    backend.decoder = decoders.ByteLevel()
    if nfc:
        backend.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TRAINING, trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return backend


def split(*patterns: str, digits: bool = False) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*steps, *[pre_tokenizers.Digits(individual_digits=True)] * digits, spell])


def single_digits() -> Backend:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return byte_level(pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]))


def sentencepiece(metaspace: bool) -> Backend:
    """Train a BPE tokenizer with byte fallback: Llama's new form (Metaspace) or its first (normalizers)."""
    learner = Backend(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learner.train_from_iterator(TRAINING, trainers.BpeTrainer(vocab_size=700, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    # Emoji are left to the byte tokens.
    tokens += [
        t
        for t, _ in sorted(learned["vocab"].items(), key=lambda item: item[1])
        if t not in SPECIAL and max(t) < "\U0001f000"
    ]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [(a, b) for a, b in learned["merges"] if a in vocab and b in vocab and a + b in vocab]
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Backend(bpe)
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return backend


SOURCES: dict[str, Callable[[], Backend]] = {
    "gpt-2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "olmo": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": single_digits,
    "refact": single_digits,
    "llama-bpe": lambda: byte_level(split(LLAMA3), ignore_merges=True),
    "dbrx": lambda: byte_level(split(LLAMA3)),
    "smaug-bpe": lambda: byte_level(split(LLAMA3)),
    "qwen2": lambda: byte_level(split(QWEN2), nfc=True),
    "deepseek-r1-qwen": lambda: byte_level(split(QWEN2)),
    "tekken": lambda: byte_level(split(TEKKEN), ignore_merges=True),
    "gpt-4o": lambda: byte_level(split(GPT4O)),
    "deepseek-coder": lambda: byte_level(
        split(
            r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", digits=True
        )
    ),
    "deepseek-v3": lambda: byte_level(
        split(r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK_V3)
    ),
    "metaspace": lambda: sentencepiece(metaspace=True),
    "llama": lambda: sentencepiece(metaspace=False),
}
"""By llama.cpp's name: OLMo 2 is dbrx, Granite refact, SmolLM3 smaug-bpe, Phi-4 mini gpt-4o."""
BYTE_LEVEL = [kind for kind in SOURCES if kind not in ("metaspace", "llama")]


@pytest.fixture(scope="module")
def source() -> Callable[[str], Backend]:
    """Give the tokenizer of a kind, trained once."""
    made: dict[str, Backend] = {}

    def get(kind: str) -> Backend:
        if kind not in made:
            made[kind] = SOURCES[kind]()
        return Backend.from_str(made[kind].to_str())

    return get


def save(backend: Backend, folder: Path, **config: object) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    base: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(base | config))
    return folder


def reference(folder: Path) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


# --- a checkpoint folder -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOURCES)
def test_a_folder_encodes_and_decodes_as_transformers_does(
    kind: str, source: Callable[[str], Backend], tmp_path: Path
) -> None:
    backend = source(kind)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    folder = save(backend, tmp_path, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    ours, theirs = Tokenizer.from_folder(folder), reference(folder)
    for text in CORPUS.values():
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), text
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.bos_token) == (1, "<s>")
    assert (ours.eos_ids, ours.eos_token) == ({2}, "</s>")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_eos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": True, "bos_token": None},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("template", [None, "<s> $A"])
def test_what_is_put_around_a_text_is_what_transformers_puts(
    config: dict[str, object], template: str | None, source: Callable[[str], Backend], tmp_path: Path
) -> None:
    backend = source("gpt-2")
    if template:
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1)])
    save(backend, tmp_path, **({"bos_token": "<s>", "eos_token": "</s>"} | config))
    assert Tokenizer.from_folder(tmp_path).encode("a b") == reference(tmp_path).encode("a b")


@pytest.mark.parametrize(
    "config",
    [
        {
            "bos_token": {"content": "<s>", "rstrip": True, "__type": "AddedToken"},
            "eos_token": "</think>",
            "extra_special_tokens": ["<think>", "</s>"],
        },
        {
            "eos_token": "</s>",
            "added_tokens_decoder": {
                "3": {"content": "<|end|>", "special": True, "lstrip": True},
                "1": {"content": "<s>", "special": False, "rstrip": True},
                "9999": {"content": "<think>", "special": True},
            },
        },
        {"eos_token": "</s>", "image_token": "<s>", "additional_special_tokens": ["<|end|>", "<unk>"]},
    ],
)
def test_tokens_that_only_the_config_calls_special_are_special(
    config: dict[str, object], source: Callable[[str], Backend], tmp_path: Path
) -> None:
    """The vocabulary has them as plain tokens; the config names them in its several ways."""
    state = json.loads(source("gpt-2").to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if "think" in t["content"]]
    folder = save(Backend.from_str(json.dumps(state)), tmp_path, **config)
    ours, theirs = Tokenizer.from_folder(folder), reference(folder)
    text = "a <s> b </s> c <|end|> d <think> e </think> f <unk>"
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_named_token_that_the_vocabulary_lacks_is_no_token(
    source: Callable[[str], Backend], tmp_path: Path
) -> None:
    folder = save(source("gpt-2"), tmp_path, bos_token="<bos>", eos_token="</s>", pad_token="<pad>")
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_id, tokenizer.bos_token) == (None, "")
    assert max(tokenizer.encode("<bos><pad>")) < tokenizer.vocab_size == source("gpt-2").get_vocab_size()


def test_a_file_set_up_for_training_batches_neither_cuts_nor_pads(
    source: Callable[[str], Backend], tmp_path: Path
) -> None:
    backend = source("gpt-2")
    plain = backend.encode(CORPUS["english"]).ids
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    assert Tokenizer.from_folder(save(backend, tmp_path)).encode(CORPUS["english"]) == plain


@pytest.mark.parametrize(
    ("files", "config", "ids", "token"),
    [
        ({}, {}, set(), ""),
        ({}, {"eos_token": "</s>"}, {2}, "</s>"),
        ({"generation_config.json": {"eos_token_id": [3, 2]}}, {"eos_token": "</s>"}, {2, 3}, "</s>"),
        ({"generation_config.json": {"eos_token_id": [3, 1]}}, {"eos_token": "</s>"}, {1, 2, 3}, "</s>"),
        ({"generation_config.json": {"eos_token_id": 3}}, {}, {3}, "<|end|>"),
        ({"config.json": {"eos_token_id": 3}}, {}, {3}, "<|end|>"),
        ({"special_tokens_map.json": {"eos_token": {"content": "<|end|>"}}}, {}, {3}, "<|end|>"),
    ],
)
def test_eos_ids_come_from_every_file_that_names_them(
    files: dict[str, object],
    config: dict[str, object],
    ids: set[int],
    token: str,
    source: Callable[[str], Backend],
    tmp_path: Path,
) -> None:
    save(source("gpt-2"), tmp_path, **config)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.eos_ids, tokenizer.eos_token) == (ids, token)


def test_the_chat_template_is_found_where_transformers_looks(
    source: Callable[[str], Backend], tmp_path: Path
) -> None:
    save(source("gpt-2"), tmp_path)
    assert Tokenizer.from_folder(tmp_path).chat_template is None
    save(source("gpt-2"), tmp_path, chat_template="plain")
    assert Tokenizer.from_folder(tmp_path).chat_template == "plain"
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "usual"}]
    save(source("gpt-2"), tmp_path, chat_template=named)
    assert Tokenizer.from_folder(tmp_path).chat_template == "usual"
    (tmp_path / "chat_template.jinja").write_text("from its file 🙂")
    assert Tokenizer.from_folder(tmp_path).chat_template == "from its file 🙂"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", b""),
        ("tokenizer.json", b'{"model": {"type": "BPE"'),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}'),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[1]"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("generation_config.json", b"nope"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_broken_file_is_named(
    name: str, content: bytes | None, source: Callable[[str], Backend], tmp_path: Path
) -> None:
    save(source("gpt-2"), tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=regex.escape(name)) as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_too_large_is_refused_before_it_is_parsed(
    source: Callable[[str], Backend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(source("gpt-2"), tmp_path)
    monkeypatch.setattr(tokenizer_module, "MAX_TOKENIZER_BYTES", (folder / "tokenizer.json").stat().st_size)
    Tokenizer.from_folder(folder)
    monkeypatch.setattr(tokenizer_module, "MAX_TOKENIZER_BYTES", 2**10)
    with pytest.raises(ModelError, match=r"tokenizer\.json is larger"):
        Tokenizer.from_folder(folder)


def test_a_decoder_that_cannot_be_streamed_is_refused() -> None:
    backend = Backend(models.BPE())
    backend.decoder = decoders.BPEDecoder()
    with pytest.raises(ModelError, match="BPEDecoder"):
        Tokenizer(backend)


# --- one tokenizer -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff", "a\ud83d b", "\ude42\ud83d"])
def test_a_lone_surrogate_is_a_clear_error(text: str, source: Callable[[str], Backend]) -> None:
    tokenizer = Tokenizer(source("gpt-2"))
    position = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    for encode in (tokenizer.encode, tokenizer.encode_with_offsets):
        with pytest.raises(
            ValueError, match=f"lone surrogate, U\\+{ord(text[position]):04X}, at character {position}"
        ):
            encode(text)


def test_offsets_are_characters_of_the_text(smollm2: Tokenizer, source: Callable[[str], Backend]) -> None:
    for text in CORPUS.values():
        triples = smollm2.encode_with_offsets(text)
        assert [i for i, _, _ in triples] == smollm2.encode(text)
        covered = {position for _, start, stop in triples for position in range(start, stop)}
        assert covered == set(range(len(text)))
    found = smollm2.encode_with_offsets("Hi 🙂<|im_end|> you")
    assert found[0][1:] == (0, 2)
    assert found[-2:] == [(2, 4, 14), (smollm2.encode(" you")[0], 14, 18)]
    framed = source("gpt-2")
    framed.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert Tokenizer(framed).encode_with_offsets("a")[0] == (1, 0, 0)


def test_the_text_of_one_token(smollm2: Tokenizer, source: Callable[[str], Backend]) -> None:
    assert smollm2.token_text(2) == "<|im_end|>"
    assert [smollm2.token_text(i) for i in smollm2.encode("Hello world\n")] == ["Hello", " world", "\n"]
    flag = smollm2.encode("🇩")
    assert b"".join(smollm2.token_bytes(i) for i in flag) == "🇩".encode()
    assert "\ufffd" in "".join(smollm2.token_text(i) for i in flag)
    for i in range(smollm2.vocab_size):
        assert smollm2.token_text(i)
    for i in (-1, smollm2.vocab_size, 2**70):
        assert (smollm2.token_text(i), smollm2.is_special(i)) == ("", True)

    for kind in ("metaspace", "llama"):
        backend = source(kind)
        tokenizer = Tokenizer(backend)
        ids = tokenizer.encode("the fox", add_special_tokens=False)
        assert "".join(tokenizer.token_text(i) for i in ids) == " the fox"
        assert tokenizer.token_text(backend.token_to_id("▁")) == " "
        assert tokenizer.token_text(backend.token_to_id("<0x0A>")) == "\n"
        assert tokenizer.token_text(backend.token_to_id("<0x20>")) == " "
        assert tokenizer.token_bytes(backend.token_to_id("<0xF0>")) == b"\xf0"
        assert tokenizer.token_text(backend.token_to_id("</s>")) == "</s>"


def test_a_vocabulary_with_holes_and_a_model_with_more_rows() -> None:
    backend = Backend(models.WordLevel({"a": 0, "b": 5}, unk_token="a"))
    tokenizer = Tokenizer(backend)
    assert tokenizer.vocab_size == 6
    assert [i for i in range(-1, 9) if not tokenizer.is_special(i)] == [0, 5]
    assert tokenizer.decode([0, 3, 5, 8, -4, 5]) == backend.decode([0, 5, 5]) == "a b b"


def test_only_special_tokens_are_special(smollm2: Tokenizer) -> None:
    assert [i for i in range(smollm2.vocab_size) if smollm2.is_special(i)] == list(range(17))


def test_threads_may_encode_and_decode_at_once(smollm2: Tokenizer) -> None:
    texts = [text * 20 for text in CORPUS.values()]
    alone = [smollm2.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(smollm2.encode, texts * 8)) == alone * 8
        assert list(pool.map(smollm2.decode, alone * 8)) == [smollm2.decode(ids) for ids in alone * 8]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_byte_level_decoding_is_the_librarys_also_for_broken_utf8(
    data: st.DataObject, smollm2: Tokenizer
) -> None:
    ids = data.draw(st.lists(st.integers(0, smollm2.vocab_size - 1) | st.integers(17, 272), max_size=40))
    backend = smollm2._backend
    for skip in (True, False):
        assert smollm2.decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip)


# --- GGUF ----------------------------------------------------------------------------------------


def to_gguf(backend: Backend, model: str, pre: str | None = None) -> dict[str, object]:
    """Write a tokenizer as the metadata of a GGUF file."""
    state = json.loads(backend.to_str())
    size = backend.get_vocab_size()
    tokens = [backend.id_to_token(i) for i in range(size)]
    added = {t["content"]: (3 if t["special"] else 4) for t in state["added_tokens"]}
    bytes_ = {f"<0x{byte:02X}>": 6 for byte in range(256)} if model == "llama" else {}
    types = [added.get(token, bytes_.get(token, 1)) for token in tokens]
    types[0] = 2
    metadata: dict[str, object] = {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    merges = [(a, b) for a, b in state["model"]["merges"]]
    if model == "gpt2":
        metadata["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges]
    else:
        ranks = {a + b: rank for rank, (a, b) in reversed(list(enumerate(merges)))}
        metadata["tokenizer.ggml.scores"] = [float(-ranks.get(token, len(ranks))) for token in tokens]
    return metadata if pre is None else metadata | {"tokenizer.ggml.pre": pre}


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_a_byte_level_gguf_encodes_as_its_source(kind: str, source: Callable[[str], Backend]) -> None:
    backend = source(kind)
    tokenizer = Tokenizer.from_gguf(to_gguf(backend, "gpt2", kind))
    for text in CORPUS.values():
        # The pieces too: a wrong cut shows in the ids only if the vocabulary has a merge across it.
        cut = tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)
        assert cut == backend.pre_tokenizer.pre_tokenize_str(text), text
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == backend.encode(text).ids, text
        assert tokenizer.decode(ids) == backend.decode(ids), text
    assert tokenizer.vocab_size == backend.get_vocab_size()
    thought = backend.token_to_id("<think>")
    assert thought in tokenizer.encode("x<think>")
    assert not tokenizer.is_special(thought)
    assert [i for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)] == [0, 1, 2, 3]


def test_every_pre_tokenizer_kind_differs_on_the_corpus(source: Callable[[str], Backend]) -> None:
    """Else the test above would not notice if one kind were built as another."""
    made = {pre: Tokenizer.from_gguf(to_gguf(source("gpt-2"), "gpt2", pre)) for pre in PRE_TOKENIZERS}
    seen = {
        pre: tuple(tuple(tokenizer.encode(text, False)) for text in CORPUS.values())
        for pre, tokenizer in made.items()
    }
    kinds = ["default", "gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-r1-qwen", "tekken", "gpt-4o"]
    kinds += ["deepseek-coder", "deepseek-v3"]
    assert len({seen[kind] for kind in kinds}) == len(kinds)
    assert {seen[pre] for pre in PRE_TOKENIZERS} == {seen[kind] for kind in kinds}


def test_a_whole_piece_in_the_vocabulary_needs_no_merges_where_the_model_ignores_them() -> None:
    metadata: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "c", "ab", "abc"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.add_bos_token": False,
    }
    for pre, ids in {"llama-bpe": [4], "tekken": [4], "gpt-2": [3, 2], "dbrx": [3, 2]}.items():
        assert Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": pre}).encode("abc") == ids


@pytest.mark.parametrize("with_merges", [False, True])
def test_a_sentencepiece_gguf_encodes_as_its_source(
    with_merges: bool, source: Callable[[str], Backend]
) -> None:
    backend = source("llama")
    metadata = to_gguf(backend, "llama")
    if with_merges:
        merges = json.loads(backend.to_str())["model"]["merges"]
        metadata["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges]
        del metadata["tokenizer.ggml.scores"]
    tokenizer = Tokenizer.from_gguf(metadata)
    for text in CORPUS.values():
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == backend.encode(text).ids, text
        assert tokenizer.decode(ids) == backend.decode(ids), text
        assert tokenizer.encode(text) == [1, *ids]


def plain_sentencepiece(text: str, vocab: dict[str, int], scores: list[float]) -> list[int]:
    """SentencePiece's rule: join the neighbours whose union scores best, of equals the leftmost."""
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        unions = [symbols[i] + symbols[i + 1] for i in range(len(symbols) - 1)]
        best = min(
            ((-scores[vocab[union]], i) for i, union in enumerate(unions) if union in vocab), default=None
        )
        if best is None:
            break
        symbols[best[1] : best[1] + 2] = [unions[best[1]]]
    return [
        i
        for symbol in symbols
        for i in (
            [vocab[symbol]] if symbol in vocab else [vocab[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        )
    ]


@pytest.mark.parametrize("backwards", [False, True])
def test_a_sentencepiece_gguf_encodes_by_sentencepieces_rule(
    backwards: bool, source: Callable[[str], Backend]
) -> None:
    metadata = to_gguf(source("llama"), "llama")
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    assert isinstance(tokens, list)
    assert isinstance(scores, list)
    if backwards:  # the scores count, not the ids
        tokens[260:], scores[260:] = tokens[:259:-1], scores[:259:-1]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer.from_gguf(metadata)
    for name, text in CORPUS.items():
        if name not in ("specials", "almost"):
            assert tokenizer.encode(text, False) == plain_sentencepiece(text, vocab, scores), text


def test_a_sentencepiece_gguf_agrees_with_transformers_reading(source: Callable[[str], Backend]) -> None:
    """What transformers builds is Llama's newer form: other after spaces and special tokens only."""
    metadata = to_gguf(source("llama"), "llama")
    named = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    convert = pytest.importorskip(
        "transformers.integrations.gguf.gguf_tokenizer_mapping"
    ).convert_gguf_tokenizer
    theirs, _ = convert("llama", named | {"tokenizer_type": "llama"})
    ours = Tokenizer.from_gguf(metadata)
    for name, text in CORPUS.items():
        if name not in ("specials", "almost", "spaces", "blank"):
            assert ours.encode(text, False) == theirs.encode(text, add_special_tokens=False).ids, text


def test_without_space_prefix_nothing_is_put_before_a_text(source: Callable[[str], Backend]) -> None:
    metadata = to_gguf(source("llama"), "llama") | {"tokenizer.ggml.add_space_prefix": False}
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.token_text(tokenizer.encode("fox", False)[0])[0] == "f"
    for text in CORPUS.values():
        assert tokenizer.decode(tokenizer.encode(text, False), skip_special_tokens=False) == text


@pytest.fixture(scope="module")
def gemma() -> transformers.GemmaTokenizer:
    """A small Gemma: runs of spaces and of newlines first, then bytes, then pieces without such, by rank."""
    runs = [char * length for char in ("\n", "\u2581") for length in range(2, 32)]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", *runs]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = json.loads(SOURCES["llama"]().to_str())["model"]["vocab"]
    tokens += ["\n", *(piece for piece in pieces if not regex.search(r"<0x|\n.|.\n|\u2581\u2581", piece))]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    merges = transformers.tokenization_utils_base.generate_merges(vocab)
    made = transformers.GemmaTokenizer(vocab=vocab, merges=merges)
    made.add_special_tokens({"extra_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    return made


def gemma_metadata(gemma: transformers.GemmaTokenizer) -> dict[str, object]:
    """As llama.cpp's converter writes it: what the model's authors defined is plain text."""
    tokens = [gemma.convert_ids_to_tokens(index) for index in range(len(gemma))]
    types = [3 if i < 7 else 4 if i < 67 else 6 if i < 323 else 1 for i in range(len(tokens))]
    return {
        "general.architecture": "gemma3",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [
            t.replace("\u2581", " ") if 7 <= i < 67 else t for i, t in enumerate(tokens)
        ],
        "tokenizer.ggml.token_type": [
            2 if token == "<unk>" else kind for token, kind in zip(tokens, types, strict=True)
        ],
        "tokenizer.ggml.scores": [-1000.0 if kind != 1 else -float(i) for i, kind in enumerate(types)],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }


def test_gemmas_gguf_encodes_as_transformers_does(gemma: transformers.GemmaTokenizer) -> None:
    tokenizer = Tokenizer.from_gguf(gemma_metadata(gemma))
    turn = "<start_of_turn>user\n\n\n  What  is\n   2+2 ?<end_of_turn>\n<start_of_turn>model\n"
    for text in [*CORPUS.values(), turn]:
        text = text.replace(" " * 71, " " * 31)
        ids = tokenizer.encode(text)
        assert ids == [2, *gemma.encode(text, add_special_tokens=False)], text
        assert tokenizer.decode(ids) == text.replace("<end_of_turn>", "").replace("<start_of_turn>", "")
    assert tokenizer.eos_ids == {1, 6}
    # Longer runs of spaces than there are tokens for are cut as SentencePiece does, which Gemma was trained
    # with: the longest first. transformers merges them by twos, fours and so on.
    spaces = {length: tokenizer.encode(" " * length, add_special_tokens=False) for length in (31, 8, 70)}
    assert [len(ids) for ids in spaces.values()] == [1, 1, 3]
    assert spaces[70] == [*spaces[31], *spaces[31], *spaces[8]]


def test_phi3s_special_tokens_take_the_space_behind_them(source: Callable[[str], Backend]) -> None:
    """As in its tokenizer_config.json: `</s>` and those of the chat do, `<s>` and `<unk>` do not."""
    backend = source("llama")
    metadata = to_gguf(backend, "llama") | {"general.architecture": "phi3"}
    stripping = {"</s>", "<|end|>"}
    tokens = [AddedToken(t, normalized=False, special=True, rstrip=t in stripping) for t in SPECIAL]
    backend.add_special_tokens(tokens)
    tokenizer = Tokenizer.from_gguf(metadata)
    text = "<s> Hi<|end|>\n <|end|> there</s>  <unk> you"
    assert tokenizer.encode(text, add_special_tokens=False) == backend.encode(text).ids
    llama = Tokenizer.from_gguf(to_gguf(source("llama"), "llama"))
    assert llama.encode(text) != tokenizer.encode(text)


def test_text_never_becomes_a_control_or_byte_token() -> None:
    """The parts of "<s>" and "<0x41>" are normal tokens here, but they are not what text is made of."""
    tokens = ["<unk>", "<s>", "</s>", "<0x41>", *"<s>0x41", "<s", "s>", "1>", "<0", "x4", "<0x4", "<s>s"]
    types = [2, 3, 3, 6] + [1] * (len(tokens) - 4)
    scores = [0.0] * len(tokens)
    merges = merges_from_scores(tokens, scores, types)
    assert set(merges) == {("<", "s"), ("s", ">"), ("<", "0"), ("x", "4"), ("<0", "x4"), ("1", ">")}


@pytest.mark.parametrize(
    ("extra", "model", "expected"),
    [
        ({}, "gpt2", "b"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "gpt2", "sb"),
        ({"tokenizer.ggml.add_bos_token": True}, "gpt2", "sb"),
        ({"tokenizer.ggml.add_eos_token": True}, "gpt2", "be"),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, "gpt2", "sbe"),
        ({}, "llama", "sb"),
        ({"tokenizer.ggml.add_bos_token": False}, "llama", "b"),
        ({"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}, "llama", "be"),
    ],
)
def test_bos_and_eos_are_added_as_the_gguf_file_says(
    extra: dict[str, object], model: str, expected: str, source: Callable[[str], Backend]
) -> None:
    metadata = to_gguf(source("gpt-2" if model == "gpt2" else "llama"), model, "gpt-2") | extra
    tokenizer = Tokenizer.from_gguf(metadata)
    body = tokenizer.encode("fox", add_special_tokens=False)
    assert tokenizer.encode("fox") == [1] * ("s" in expected) + body + [2] * ("e" in expected)
    assert 1 not in body
    assert 2 not in body


def test_a_sentencepiece_gguf_that_names_no_bos_and_eos_has_llamas(source: Callable[[str], Backend]) -> None:
    metadata = to_gguf(source("llama"), "llama")
    for name in ("bos", "eos"):
        del metadata[f"tokenizer.ggml.{name}_token_id"]
    tokenizer = Tokenizer.from_gguf(metadata)
    assert (tokenizer.bos_id, tokenizer.eos_token, tokenizer.eos_ids) == (1, "</s>", {2, 3})


def test_every_end_of_turn_token_ends_a_generation(source: Callable[[str], Backend]) -> None:
    metadata = to_gguf(source("gpt-2"), "gpt2", "gpt-2")
    assert Tokenizer.from_gguf(metadata).eos_ids == {2, 3}  # </s> by id, <|end|> by name
    types = metadata["tokenizer.ggml.token_type"]
    assert isinstance(types, list)
    no_control = metadata | {
        "tokenizer.ggml.token_type": [1 if i == 3 else kind for i, kind in enumerate(types)]
    }
    assert Tokenizer.from_gguf(no_control).eos_ids == {2}
    named = metadata | {"tokenizer.ggml.eot_token_id": 40, "tokenizer.ggml.eom_token_id": 41}
    assert Tokenizer.from_gguf(named).eos_ids == {2, 3, 40, 41}
    del named["tokenizer.ggml.eos_token_id"]
    tokenizer = Tokenizer.from_gguf(named)
    assert (tokenizer.eos_ids, tokenizer.eos_token) == ({3, 40, 41}, "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": None}, r"tokenizer\.ggml\.model is missing"),
        ({"tokenizer.ggml.model": "rwkv"}, r"'rwkv'.*'gpt2' and 'llama'"),
        ({"tokenizer.ggml.pre": "telepathy"}, r"'telepathy'.*llama-bpe, .*qwen2, .*smollm"),
        ({"tokenizer.ggml.tokens": None}, r"tokenizer\.ggml\.tokens is missing"),
        ({"tokenizer.ggml.tokens": ["a", 1]}, r"tokenizer\.ggml\.tokens is of the wrong type"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": None}, "the same token twice"),
        ({"tokenizer.ggml.token_type": [1, 1]}, r"token_type has 2 entries for \d+ tokens"),
        ({"tokenizer.ggml.merges": None}, r"tokenizer\.ggml\.merges is missing"),
        ({"tokenizer.ggml.merges": ["a nowhere"]}, r"merges do not fit.*nowhere"),
        ({"tokenizer.ggml.merges": ["a"]}, "merges do not fit"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, r"eos_token_id is 1000000, but its vocabulary has"),
        ({"tokenizer.ggml.bos_token_id": -1}, r"bos_token_id is -1"),
        ({"tokenizer.ggml.add_bos_token": "yes"}, r"add_bos_token is 'yes'"),
        ({"tokenizer.chat_template": 3}, r"tokenizer\.chat_template is not a text"),
        ({"tokenizer.ggml.model": "llama"}, r"tokenizer\.ggml\.merges|tokenizer\.ggml\.scores"),
    ],
)
def test_gguf_metadata_that_cannot_be_served_are_named(
    changes: dict[str, object], message: str, source: Callable[[str], Backend]
) -> None:
    metadata = to_gguf(source("gpt-2"), "gpt2", "gpt-2") | changes
    if changes.get("tokenizer.ggml.model") == "llama":
        del metadata["tokenizer.ggml.merges"]
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_gguf({key: value for key, value in metadata.items() if value is not None})


def test_a_sentencepiece_vocabulary_without_bytes_has_one_unknown_for_a_run() -> None:
    metadata: dict[str, object] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "\u2581", "a"],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1],
        "tokenizer.ggml.scores": [0.0] * 5,
    }
    assert Tokenizer.from_gguf(metadata).encode("a\u4f60\u597d a") == [1, 3, 4, 0, 3, 4]


def test_an_added_token_stands_for_its_own_text() -> None:
    """Byte-level tokens are spelled in an alphabet of their own, added ones are not."""
    metadata: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "\u0120", "<\uff5cend\u2581of\u2581sentence\uff5c>", "   "],
        "tokenizer.ggml.token_type": [1, 1, 3, 4],
        "tokenizer.ggml.merges": [],
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    text = "a   a <\uff5cend\u2581of\u2581sentence\uff5c>"
    assert tokenizer.encode(text) == [0, 3, 0, 1, 2]
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert tokenizer.decode(tokenizer.encode(text)) == "a   a "
    assert tokenizer.eos_ids == {2}


def test_empty_tokens_do_not_collide() -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "", "", "b"],
        "tokenizer.ggml.merges": [],
    }
    assert Tokenizer.from_gguf(metadata).encode("ab") == [0, 3]


# --- the real SmolLM2 ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2_metadata(smollm2_path: Path) -> dict[str, object]:
    return read_metadata(smollm2_path)


@pytest.fixture(scope="module")
def smollm2(smollm2_metadata: dict[str, object]) -> Tokenizer:
    return Tokenizer.from_gguf(smollm2_metadata)


class PlainByteLevel:
    """Byte-level BPE in plain Python from a GGUF file's own lists; it shares nothing with the server."""

    def __init__(self, metadata: dict[str, object], splits: list[str]) -> None:
        tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
        types = metadata["tokenizer.ggml.token_type"]
        assert isinstance(tokens, list)
        assert isinstance(merges, list)
        assert isinstance(types, list)
        self.vocab = {token: index for index, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        control = sorted(
            (t for t, kind in zip(tokens, types, strict=True) if kind != 1), key=len, reverse=True
        )
        self.control = regex.compile("(" + "|".join(map(regex.escape, control)) + ")")
        self.splits = [regex.compile(pattern) for pattern in splits]
        spelled = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
        self.spelling = {b: chr(b) for b in spelled}
        for b in range(256):
            self.spelling.setdefault(b, chr(256 + len(self.spelling) - len(spelled)))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(self.control.split(text)):
            if index % 2:
                ids.append(self.vocab[part])
                continue
            pieces = [part]
            for pattern in self.splits:
                pieces = [cut for piece in pieces for cut in self.isolate(pattern, piece)]
            for piece in pieces:
                ids += self.merge([self.spelling[b] for b in piece.encode()])
        return ids

    def isolate(self, pattern: "regex.Pattern[str]", text: str) -> list[str]:
        cuts, last = [], 0
        for match in pattern.finditer(text):
            cuts += [text[last : match.start()], match.group()]
            last = match.end()
        return [cut for cut in [*cuts, text[last:]] if cut]

    def merge(self, symbols: list[str]) -> list[int]:
        # The vocabulary lacks some bytes that its training text did not have: they are as if not there.
        symbols = [symbol for symbol in symbols if symbol in self.vocab]
        while True:
            ranked = [
                (self.ranks[pair], i)
                for i, pair in enumerate(itertools.pairwise(symbols))
                if pair in self.ranks
            ]
            if not ranked:
                return [self.vocab[symbol] for symbol in symbols]
            i = min(ranked)[1]
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


@pytest.fixture(scope="module")
def plain(smollm2_metadata: dict[str, object]) -> PlainByteLevel:
    return PlainByteLevel(smollm2_metadata, [r"\p{N}", GPT2])


SMOLLM2_TEXTS = {
    **CORPUS,
    "chat": "<|im_start|>user\nHow many r's are in 2024?<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
    "cut": "<|im_start|<|im_end|>|im_end|>",
}


def test_smollm2_encodes_as_plain_python_does(smollm2: Tokenizer, plain: PlainByteLevel) -> None:
    for text in SMOLLM2_TEXTS.values():
        assert smollm2.encode(text) == plain.encode(text), text


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60) | st.text("ab 1\n\t.'é你🙂\u0301<|>_", max_size=60))
def test_smollm2_encodes_any_text_as_plain_python_does_and_back(
    text: str, smollm2: Tokenizer, plain: PlainByteLevel
) -> None:
    ids = smollm2.encode(text)
    assert ids == plain.encode(text)
    if all(plain.spelling[byte] in plain.vocab for byte in text.encode()):
        assert smollm2.decode(ids, skip_special_tokens=False) == text


def test_the_default_pre_tokenizer_cuts_as_llama_cpp_does(smollm2_metadata: dict[str, object]) -> None:
    words = GPT2.removesuffix(r"|\s+")
    plain = PlainByteLevel(smollm2_metadata, [r"[\p{P}$+<=>^~|]+", words, r"\p{N}+", "[0-9][0-9][0-9]"])
    missing = {key: value for key, value in smollm2_metadata.items() if key != "tokenizer.ggml.pre"}
    for metadata in (missing, smollm2_metadata | {"tokenizer.ggml.pre": "default"}):
        tokenizer = Tokenizer.from_gguf(metadata)
        for text in CORPUS.values():
            assert tokenizer.encode(text) == plain.encode(text), text


def test_smollm2_agrees_with_transformers_where_that_knows_its_pre_tokenizer(
    smollm2: Tokenizer, smollm2_path: Path
) -> None:
    """What transformers reads it with is GPT-2's pre-tokenizer: the same but for numbers."""
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    assert len(theirs) == smollm2.vocab_size
    compared = 0
    for text in SMOLLM2_TEXTS.values():
        if not regex.search(r"\p{N}", text):
            assert smollm2.encode(text) == theirs.encode(text), text
            compared += 1
    assert compared >= 10
    for text in SMOLLM2_TEXTS.values():
        ids = smollm2.encode(text)
        assert smollm2.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_smollm2s_own_facts(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_id, smollm2.bos_token, smollm2.eos_token) == (1, "<|im_start|>", "<|im_end|>")
    assert smollm2.eos_ids == {0, 2}
    assert smollm2.encode("<|im_start|>user") == [1, 4093]
    assert smollm2.chat_template is not None
    assert "SmolLM" in smollm2.chat_template


@pytest.mark.alone
def test_loading_is_quick(smollm2_metadata: dict[str, object]) -> None:
    def seconds(load: Callable[[], object]) -> float:
        started = time.perf_counter()
        load()
        return time.perf_counter() - started

    assert min(seconds(partial(Tokenizer.from_gguf, smollm2_metadata)) for _ in range(3)) < 1.5
    # A SentencePiece vocabulary of 98k tokens of real lengths: SmolLM2's, and each with one more letter.
    tokens = smollm2_metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    large = list(dict.fromkeys([*tokens, *(token + "e" for token in tokens)]))
    scores = [-float(index) for index in range(len(large))]
    assert seconds(lambda: merges_from_scores(large, scores, [1] * len(large))) < 3
