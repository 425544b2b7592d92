"""The bytes that a token stands for, the same whatever is beside it; read from the tokenizer's decoder."""

import json
import re

import tokenizers

from model.errors import ModelError
from server.text.library import library_call

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes that each token of a vocabulary stands for, as its decoder has it."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        # Filled as tokens come up; threads that do so at the same time write the same value.
        self._known: dict[int, bytes] = {}
        decoder = _decoder_types(backend)
        self._alphabet = byte_alphabet() if "ByteLevel" in decoder else None
        self._byte_fallback = "ByteFallback" in decoder

    def read(self, token_id: int, first: bool) -> bytes:
        """Give the bytes of a token that exists, which may be a part of a character.

        The `first` token of a text loses the space that a SentencePiece model puts before every text.
        """
        if first and self._alphabet is None:
            return self._decode(token_id, first=True)
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._decode(token_id, first=False)
        return known

    def _decode(self, token_id: int, first: bool) -> bytes:
        token = self._backend.id_to_token(token_id)
        assert token is not None
        if self._alphabet is not None:
            try:
                return bytes([self._alphabet[char] for char in token])
            except KeyError:  # an added token, which stands for its own text
                return token.encode()
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)) and int(match[1], 16) >= 0x80:
            return bytes.fromhex(match[1])
        # Whatever the decoder is: a token adds to a text what its second occurrence adds to its first.
        with library_call():
            alone = self._backend.decode([token_id], skip_special_tokens=False)
            if first:
                return alone.encode()
            twice = self._backend.decode([token_id, token_id], skip_special_tokens=False)
        return twice[len(alone) :].encode()


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
