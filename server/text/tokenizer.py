"""Text -> token ids and token ids -> text, for one model.

Wraps the `tokenizers` library; knows nothing about requests. Any number of threads may use one at a time.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

import tokenizers
from tokenizers import AddedToken, processors

from model.errors import ModelError
from server.text.gguf_tokenizer import read_gguf_tokenizer
from server.text.library import library_call, one_line, reading
from server.text.token_bytes import TokenBytes

# The largest vocabularies in use (256k tokens) make a tokenizer.json of some 35 MB, and parsing takes several
# times a file's size in memory.
MAX_TOKENIZER_BYTES = 256 * 1024 * 1024
MAX_CONFIG_BYTES = 16 * 1024 * 1024

_SAMPLE = "Hello, W\u00f6rld 123!\n  \U0001f642 "
_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


class Tokenizer:
    """One model's tokenizer: encoding, decoding and the ids that mean something to a server."""

    vocab_size: int
    """One more than the largest token id; the model's embedding may have more rows."""
    bos_id: int | None
    bos_token: str
    """Empty if the model has none, as is `eos_token`."""
    eos_ids: frozenset[int]
    """Every token that ends a generation."""
    eos_token: str
    chat_template: str | None

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        chat_template: str | None = None,
    ) -> None:
        # A file may carry settings for training batches; a prompt must come back as long as it is.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        # What these take is bounded by the tokens that there are: an id may be any number.
        self._ids = frozenset(backend.get_vocab().values())
        self.vocab_size = max(self._ids, default=-1) + 1
        self._marked = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._bytes = TokenBytes(backend)
        # Filled as tokens come up; threads that do so at the same time write the same value.
        self._whole: dict[int, str | None] = {}
        self.bos_id = bos_id
        self.bos_token = self._name(bos_id)
        self.eos_ids = frozenset(eos_ids) | ({eos_id} if eos_id is not None else set())
        self.eos_token = self._name(eos_id)
        self.chat_template = chat_template

    @classmethod
    def from_folder(cls, folder: Path, eos_ids: Iterable[int] = ()) -> Self:
        """Load a checkpoint folder in transformers' layout.

        `tokenizer.json` is needed. `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja`
        and the EOS ids in `generation_config.json` (or `config.json`) are read if present, and mean what they
        mean to transformers 5: whether BOS is added, `tokenizer.json` alone says, not `add_bos_token`.
        `eos_ids` are more ends of a generation, which another folder tells.
        Raises ModelError for a file that is missing or broken.
        """
        with reading(str(folder / "tokenizer.json")):
            return cls._read_folder(folder, eos_ids)

    @classmethod
    def _read_folder(cls, folder: Path, more_eos_ids: Iterable[int]) -> Self:
        backend = _read_backend(folder)
        config = _read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config |= _read_json(folder / "special_tokens_map.json")
        _mark_special_tokens(backend, config)
        model = _read_json(folder / "generation_config.json") or _read_json(folder / "config.json")

        bos_id = _named_id(backend, config, "bos_token")
        eos_id = _named_id(backend, config, "eos_token")
        eos_ids = [*_ids(model.get("eos_token_id")), *more_eos_ids]
        if eos_id is None and eos_ids:
            eos_id = eos_ids[0]
        tokenizer = cls(
            backend,
            bos_id=bos_id,
            eos_id=eos_id,
            eos_ids=eos_ids,
            chat_template=_chat_template(folder, config),
        )
        # Rules that contradict each other are found by using them, and better now than by a client.
        tokenizer.decode(tokenizer.encode(_SAMPLE))
        return tokenizer

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> Self:
        """Build the tokenizer that a GGUF file's metadata (key -> plain value) describe; or ModelError."""
        with reading("The GGUF file's metadata"):
            gguf = read_gguf_tokenizer(metadata)
            bos_id, eos_id = gguf.bos_id if gguf.add_bos else None, gguf.eos_id if gguf.add_eos else None
            _frame(gguf.backend, bos_id, eos_id)
            return cls(
                gguf.backend,
                bos_id=gguf.bos_id,
                eos_id=gguf.eos_id,
                eos_ids=gguf.end_ids,
                chat_template=gguf.chat_template,
            )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Turn a text into token ids; special tokens spelled in it become their ids.

        `add_special_tokens` puts BOS or EOS around it where the model wants them: false for a rendered chat
        template, which has written its own. Releases the GIL. Raises ValueError on lone surrogates, and
        TokenizerError where the tokenizer's own rules break on the text.
        """
        _check_unicode(text)
        with library_call():
            # The only call of the library that keeps no offsets: twice as fast on long texts.
            return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def encode_with_offsets(self, text: str, add_special_tokens: bool = True) -> list[tuple[int, int, int]]:
        """As `encode`; each id comes with its start and stop in the text's characters.

        An added token stands at (0, 0). Tokens that share a character all carry that whole character.
        """
        _check_unicode(text)
        with library_call():
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return [(i, start, stop) for i, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Turn token ids into text; ids without a token are passed over, and invalid UTF-8 becomes U+FFFD.

        Equal to the library's decoding but where byte-fallback tokens spell invalid UTF-8: the library then
        spoils the valid characters beside it too, which no stream could do after having sent them.
        """
        shown = [
            i for i in ids if 0 <= i < self.vocab_size and not (skip_special_tokens and self.is_special(i))
        ]
        pieces = [self.token_bytes(i, first=index == 0) for index, i in enumerate(shown)]
        return b"".join(pieces).decode("utf-8", "replace")

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """Give the UTF-8 bytes that a token stands for, perhaps a part of a character; b"" for no such token.

        The `first` token of a text loses the space that a SentencePiece model puts before every text.
        """
        return self._bytes.read(token_id, first) if token_id in self._ids else b""

    def whole_text(self, token_id: int) -> str | None:
        """Give the text that a token adds between whole characters; None if it is no whole characters itself.

        A special token has none, which is the empty text.
        """
        try:
            return self._whole[token_id]
        except KeyError:
            text = self._whole[token_id] = self._read_whole(token_id)
            return text

    def _read_whole(self, token_id: int) -> str | None:
        if self.is_special(token_id):
            return ""
        try:
            return self.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            return None

    def token_text(self, token_id: int) -> str:
        """Give the text of one token on its own, special or not; a part of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        """Whether decoding skips the token: a special one, or an id without a token."""
        return token_id in self._marked or token_id not in self._ids

    def _name(self, token_id: int | None) -> str:
        if token_id is None or token_id not in self._ids:
            return ""
        return self._backend.id_to_token(token_id) or ""


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise ValueError(f"The text has a lone surrogate, {code}, at character {error.start}.") from None


def _frame(backend: tokenizers.Tokenizer, bos_id: int | None, eos_id: int | None) -> None:
    """Make the tokenizer put BOS before and EOS after a text, whichever is given."""
    given = [(name, i) for name, i in (("bos", bos_id), ("eos", eos_id)) if i is not None]
    special = [{"id": name, "ids": [i], "tokens": [backend.id_to_token(i)]} for name, i in given]
    single = ["bos:0"] * (bos_id is not None) + ["$A:0"] + ["eos:0"] * (eos_id is not None)
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    text = _read_file(path, MAX_TOKENIZER_BYTES)
    if text is None:
        raise ModelError(
            f"{folder} has no tokenizer.json; transformers writes one with "
            "AutoTokenizer.from_pretrained(model).save_pretrained(folder), and --tokenizer names another one."
        )
    return tokenizers.Tokenizer.from_str(text)


def _read_file(path: Path, limit: int) -> str | None:
    """Read a text file of at most `limit` bytes; None if there is none."""
    try:
        if not path.is_file():  # nor is a pipe one, which would be waited for
            return None
        if path.stat().st_size > limit:
            raise ModelError(f"{path} is larger than {limit // 2**20} MiB; is it the right file?")
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read ({error}); fetching it again may help.") from error


def _read_json(path: Path) -> dict[str, object]:
    """Read a JSON object; an empty one if there is no such file."""
    text = _read_file(path, MAX_CONFIG_BYTES)
    try:
        value = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} is not valid JSON ({one_line(error)}); fetching it again may help."
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object; fetching it again may help.")
    return value


def _content(value: object) -> str | None:
    """Give the text of a token, which the config files write as a string or as an object."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _named_id(backend: tokenizers.Tokenizer, config: Mapping[str, object], name: str) -> int | None:
    content = _content(config.get(name))
    return None if content is None else backend.token_to_id(content)


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int)]


def _mark_special_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, object]) -> None:
    """Let the tokens that the config names count as special, as transformers does.

    A named token that the vocabulary lacks stays out: its new id would lie beyond the model's embedding.
    """
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    changed: dict[str, AddedToken] = {}
    listed = config.get("added_tokens_decoder")
    for value in listed.values() if isinstance(listed, dict) else ():
        if content := _content(value):
            changed[content] = _added_token(content, value)
    for key, value in config.items():
        if key.endswith("_token") and (content := _content(value)):
            token = changed.get(content) or added.get(content) or _added_token(content, value)
            token.special = True
            changed[content] = token
    for key in ("additional_special_tokens", "extra_special_tokens"):
        values = config.get(key)
        for value in values if isinstance(values, list) else ():
            content = _content(value)
            if content and content not in added:
                changed.setdefault(content, _added_token(content, value))
    known = [token for content, token in changed.items() if backend.token_to_id(content) is not None]
    backend.add_special_tokens([token for token in known if token.special])
    backend.add_tokens([token for token in known if not token.special])


def _added_token(content: str, value: object) -> AddedToken:
    given = value if isinstance(value, dict) else {"special": True}
    return AddedToken(content, **{flag: bool(given[flag]) for flag in _TOKEN_FLAGS if flag in given})


def _chat_template(folder: Path, config: Mapping[str, object]) -> str | None:
    """Find the chat template: its own file, or the config's text or named "default" there."""
    template = _read_file(folder / "chat_template.jinja", MAX_CONFIG_BYTES) or config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
