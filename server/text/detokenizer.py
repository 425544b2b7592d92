"""Token ids -> text as they come, never half a character.

A token stands for the same bytes whatever is beside it; a text is the UTF-8 decoding of its tokens' bytes.
So a stream costs the same at every token, holds back three bytes at most and adds up to the whole text.
"""

import codecs
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import tokenizers

from model.errors import ModelError

if TYPE_CHECKING:
    from server.text.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes that each token of a vocabulary stands for, as its decoder has it."""

    def __init__(self, backend: tokenizers.Tokenizer, size: int) -> None:
        self._backend = backend
        # Filled as tokens come up; threads that do so at the same time write the same value.
        self._known: list[bytes | None] = [None] * size
        decoder = _decoder_types(backend)
        self._alphabet = byte_alphabet() if "ByteLevel" in decoder else None
        self._byte_fallback = "ByteFallback" in decoder

    def read(self, token_id: int, first: bool) -> bytes:
        """Give a token's bytes, which may be a part of a character; b"" if there is no such token.

        The `first` token of a text loses the space that a SentencePiece model puts before every text.
        """
        if not 0 <= token_id < len(self._known):
            return b""
        if first and self._alphabet is None:
            return self._decode(token_id, first=True)
        known = self._known[token_id]
        if known is None:
            known = self._known[token_id] = self._decode(token_id, first=False)
        return known

    def _decode(self, token_id: int, first: bool) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._alphabet is not None:
            try:
                return bytes([self._alphabet[char] for char in token])
            except KeyError:  # an added token, which stands for its own text
                return token.encode()
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)) and int(match[1], 16) >= 0x80:
            return bytes.fromhex(match[1])
        # Whatever the decoder is: a token adds to a text what its second occurrence adds to its first.
        alone = self._backend.decode([token_id], skip_special_tokens=False)
        if first:
            return alone.encode()
        return self._backend.decode([token_id, token_id], skip_special_tokens=False)[len(alone) :].encode()


class Detokenizer:
    """The text of one sequence, token by token; special tokens have none.

    The deltas and the rest from `flush` together equal `tokenizer.decode(all ids)`. With the prompt's ids
    the text is instead what the output adds to the prompt: a SentencePiece model's first word keeps its
    space, and a character that the prompt begins and the output ends comes whole.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tail = self._tail(prompt_ids)
        self._first = tail is None
        self._decoder.decode(tail or b"")

    def push(self, token_id: int) -> str:
        """Give the text that the next token completes; empty for a special token or a part of a character."""
        if self._tokenizer.is_special(token_id):
            return ""
        piece = self._tokenizer.token_bytes(token_id, first=self._first)
        self._first = False
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """End the text: give U+FFFD for a character that was begun and not ended, else nothing."""
        return self._decoder.decode(b"", final=True)

    def _tail(self, prompt_ids: Sequence[int]) -> bytes | None:
        """Give the prompt's last bytes, enough for any unfinished character; None if no token has text."""
        tail = None
        for token_id in reversed(prompt_ids):
            if not self._tokenizer.is_special(token_id):
                tail = self._tokenizer.token_bytes(token_id) + (tail or b"")
                if len(tail) >= 4:
                    break
        return tail


def byte_alphabet() -> dict[str, int]:
    """Build GPT-2's byte-level alphabet: the byte that each of its 256 printable characters stands for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


def _decoder_types(backend: tokenizers.Tokenizer) -> set[str]:
    """Name the decoder's steps; refuse those whose text for a token depends on the tokens after it."""
    decoder = backend.decoder
    state = json.loads(decoder.__getstate__()) if decoder is not None else {}
    types = {str(step["type"]) for step in state.get("decoders", [state]) if "type" in step}
    if unsupported := types & {"BPEDecoder", "CTC"}:
        raise ModelError(
            f"The tokenizer decodes with {min(unsupported)}, which cannot be streamed; "
            "a model with a byte-level or SentencePiece tokenizer would help."
        )
    return types
