"""GGUF metadata (plain key -> value) -> the tokenizer that it describes.

Knows llama.cpp's key and pre-tokenizer names, byte-level BPE ("gpt2") and SentencePiece BPE ("llama").
What cannot be built faithfully is a ModelError that names the key: a near miss would quietly spoil answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer

from model.errors import ModelError

# `tokenizer.ggml.token_type`; unused tokens (5) are normal ones that no merge may make.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

# Control tokens at which a model's turn or text ends. Files name at most three such ids, often only one, so
# llama.cpp finds the others by their text; so do we.
END_OF_GENERATION = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<EOT>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek's
    }
)

# Phi-3's special tokens take the white space behind them away, but for these. No key says so; llama.cpp
# knows the model by its name.
_PHI3_PLAIN = frozenset({"<unk>", "<s>", "<|endoftext|>"})

# Far above any published vocabulary's: what is derived from the tokens may grow with their lengths' squares.
_LONGEST_TOKEN = 1 << 10
_MOST_MERGES = 1 << 23

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_GPT2 = rf"{_WORDS}|\s+"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a byte-level vocabulary cuts a text into the pieces inside which it merges."""

    splits: tuple[str, ...]
    """Applied one after the other; matches and the gaps between them become pieces."""
    nfc: bool = False
    """The text is brought into Unicode's NFC before anything else."""
    ignore_merges: bool = False
    """A piece that is itself in the vocabulary is one token, whatever the merges say."""
    add_bos: bool = False
    """Whether a file without `add_bos_token` means yes."""


_SINGLE_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3 = PreTokenizer((rf"{_CASELESS}|\p{{N}}{{1,3}}{_TAIL}",), ignore_merges=True, add_bos=True)
_QWEN2 = (rf"{_CASELESS}|\p{{N}}{_TAIL}",)

# Names as in llama.cpp's `llama-vocab.cpp`, expressions as in the models' own tokenizer.json. "default" is
# what old converters wrote; llama.cpp gives it expressions of its own.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((_GPT2,)),
    "phi-2": PreTokenizer((_GPT2,)),
    "olmo": PreTokenizer((_GPT2,)),
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,  # Granite
    "codeshell": _SINGLE_DIGITS,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "dbrx": PreTokenizer(_LLAMA3.splits),  # OLMo 2, Granite 4, Phi-4
    "smaug-bpe": PreTokenizer(_LLAMA3.splits),  # SmolLM3
    "qwen2": PreTokenizer(_QWEN2, nfc=True),
    "deepseek-r1-qwen": PreTokenizer(_QWEN2),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o": PreTokenizer((_GPT4O,)),
    "deepseek-coder": PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
    ),
    "deepseek-v3": PreTokenizer((r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK_V3)),
}


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """What a GGUF file says about text."""

    backend: Tokenizer
    """Without a post-processor: it adds neither BOS nor EOS."""
    bos_id: int | None
    eos_id: int | None
    end_ids: frozenset[int]
    """Every token that ends a generation, `eos_id` among them."""
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def read_gguf_tokenizer(metadata: Mapping[str, object]) -> GgufTokenizer:
    """Build the tokenizer that a GGUF file's metadata describe.

    Raises ModelError where a key is missing, of the wrong type or inconsistent, or asks for the unsupported.
    """
    model = _text(metadata, "tokenizer.ggml.model")
    tokens = _vocabulary(metadata)
    types = _array(metadata, "tokenizer.ggml.token_type", int, len(tokens), default=[NORMAL] * len(tokens))
    if model == "gpt2":
        backend, add_bos = _byte_level(metadata, tokens)
    elif model == "llama":
        backend, add_bos = _sentencepiece(metadata, tokens, types), True
    else:
        raise ModelError(
            f"The GGUF file's tokenizer.ggml.model is {model!r}, and Rivulet reads 'gpt2' and 'llama'; "
            "a checkpoint folder with a tokenizer.json would help."
        )
    typed = list(zip(tokens, types, strict=True))
    special = [t for t, kind in typed if kind in (CONTROL, UNKNOWN)]
    stripping = model == "llama" and metadata.get("general.architecture") == "phi3"
    backend.add_special_tokens(
        [
            AddedToken(t, normalized=False, special=True, rstrip=stripping and t not in _PHI3_PLAIN)
            for t in special
        ]
    )
    backend.add_tokens([AddedToken(t, normalized=False) for t, kind in typed if kind == USER_DEFINED])

    def token_id(name: str, default: int | None = None) -> int | None:
        return _token_id(metadata, f"tokenizer.ggml.{name}_token_id", len(tokens), default)

    # llama.cpp's defaults for SentencePiece files that do not say; a byte-level file has none.
    bos_id = token_id("bos", 1 if model == "llama" else None)
    eos_id = token_id("eos", 2 if model == "llama" else None)
    named = {i for i in (eos_id, token_id("eot"), token_id("eom")) if i is not None}
    found = {i for i, (t, kind) in enumerate(typed) if kind == CONTROL and t in END_OF_GENERATION}
    return GgufTokenizer(
        backend=backend,
        bos_id=bos_id,
        eos_id=eos_id,
        end_ids=frozenset(named | found),
        add_bos=_flag(metadata, "tokenizer.ggml.add_bos_token", add_bos),
        add_eos=_flag(metadata, "tokenizer.ggml.add_eos_token", False),
        chat_template=_text(metadata, "tokenizer.chat_template", "") or None,
    )


def _byte_level(metadata: Mapping[str, object], tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    """GPT-2's scheme: the text's bytes, spelled as printable characters, are merged by rank."""
    name = _text(metadata, "tokenizer.ggml.pre", "default")
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise ModelError(
            f"The GGUF file's pre-tokenizer (tokenizer.ggml.pre) is {name!r}, and Rivulet knows {known}; "
            "a checkpoint folder with a tokenizer.json would help."
        )
    backend = Tokenizer(_bpe(tokens, _file_merges(metadata), ignore_merges=pre.ignore_merges))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in pre.splits]
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, spell])
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _sentencepiece(metadata: Mapping[str, object], tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    """SentencePiece's BPE: characters are merged by score, unknown characters become byte tokens."""
    if "tokenizer.ggml.merges" in metadata:
        merges = _file_merges(metadata)
    else:
        scores = _array(metadata, "tokenizer.ggml.scores", (int, float), len(tokens))
        merges = merges_from_scores(tokens, scores, types)
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    bpe = _bpe(tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in types)
    backend = Tokenizer(bpe)
    # A space is put before the text and before whatever follows a special token, as llama.cpp does and as the
    # models' first tokenizer.json files did; "Metaspace, first" leaves the second one out.
    prefix = _flag(metadata, "tokenizer.ggml.add_space_prefix", True)
    steps: list[Normalizer] = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def merges_from_scores(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Derive the merges that a SentencePiece vocabulary implies, best first.

    SentencePiece joins the neighbours whose union scores best. As ranked merges that is every way to cut a
    token into two others, the token of the higher score first. Only normal pieces take part: text never
    becomes a control or byte token.
    """
    pieces = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    merges: list[tuple[str, str]] = []
    for index in sorted(range(len(tokens)), key=lambda i: -scores[i]):
        if types[index] == NORMAL:
            token = tokens[index]
            merges.extend(
                (token[:cut], token[cut:])
                for cut in range(len(token) - 1, 0, -1)
                if token[:cut] in pieces and token[cut:] in pieces
            )
            if len(merges) > _MOST_MERGES:
                raise ModelError(
                    f"The GGUF file's tokenizer.ggml.tokens imply more than {_MOST_MERGES:,} merges, more"
                    " than any vocabulary has; download the file again."
                )
    return merges


def _bpe(tokens: Sequence[str], merges: list[tuple[str, str]], **options: object) -> models.BPE:
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ModelError("The GGUF file's vocabulary (tokenizer.ggml.tokens) has the same token twice.")
    try:
        return models.BPE(vocab=vocab, merges=merges, **options)
    except Exception as error:  # the library raises bare Exceptions, here for a merge of unknown tokens
        raise ModelError(
            f"The GGUF file's tokenizer.ggml.merges do not fit its vocabulary: {error}."
        ) from error


def _vocabulary(metadata: Mapping[str, object]) -> list[str]:
    tokens = _array(metadata, "tokenizer.ggml.tokens", str)
    if len(longest := max(tokens, key=len, default="")) > _LONGEST_TOKEN:
        raise ModelError(
            f"The GGUF file's tokenizer.ggml.tokens hold a token of {len(longest)} characters, more than any"
            " vocabulary has; download the file again."
        )
    # An empty token would match between any two characters; llama.cpp renames it in the same way.
    return [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]


def _file_merges(metadata: Mapping[str, object]) -> list[tuple[str, str]]:
    merges = []
    for line in _array(metadata, "tokenizer.ggml.merges", str):
        left, _, right = line.partition(" ")
        merges.append((left, right))
    return merges


def _token_id(metadata: Mapping[str, object], key: str, size: int, default: int | None) -> int | None:
    value = metadata.get(key)
    if value is None:
        return default if default is not None and default < size else None
    if not isinstance(value, int) or not 0 <= value < size:
        raise ModelError(f"The GGUF file's {key} is {value!r}, but its vocabulary has {size} tokens.")
    return value


def _flag(metadata: Mapping[str, object], key: str, default: bool) -> bool:
    value = metadata.get(key, default)
    if not isinstance(value, bool):
        raise ModelError(f"The GGUF file's {key} is {value!r}, not true or false.")
    return value


def _text(metadata: Mapping[str, object], key: str, default: str | None = None) -> str:
    value = metadata.get(key, default)
    if not isinstance(value, str):
        raise ModelError(f"The GGUF file's {key} is {'missing' if value is None else 'not a text'}.")
    return value


_Item = TypeVar("_Item")


def _array(
    metadata: Mapping[str, object],
    key: str,
    kind: type[_Item] | tuple[type[_Item], ...],
    length: int | None = None,
    default: list[_Item] | None = None,
) -> list[_Item]:
    value = metadata.get(key, default)
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise ModelError(f"The GGUF file's {key} is {'missing' if value is None else 'of the wrong type'}.")
    if length is not None and len(value) != length:
        raise ModelError(f"The GGUF file's {key} has {len(value)} entries for {length} tokens.")
    return value
