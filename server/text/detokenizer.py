"""Token ids -> text as they come, never half a character.

A token stands for the same bytes whatever is beside it; a text is the UTF-8 decoding of its tokens' bytes.
So a stream costs the same at every token, holds back three bytes at most and adds up to the whole text.
"""

import codecs
from collections.abc import Sequence

from server.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one sequence, token by token; special tokens have none.

    The deltas and the rest from `flush` together equal `tokenizer.decode(all ids)`. With the prompt's ids
    the text is instead what the output adds to the prompt: a SentencePiece model's first word keeps its
    space, and a character that the prompt begins and the output ends comes whole.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tail = self._tail(prompt_ids)
        self._first = tail is None
        self._decoder.decode(tail or b"")
        self._whole = self._ends_whole()

    def push(self, token_id: int) -> str:
        """Give the text that the next token completes; empty for a special token or a part of a character."""
        if self._whole and not self._first:
            text = self._tokenizer.whole_text(token_id)
            if text is not None:
                return text
        if self._tokenizer.is_special(token_id):
            return ""
        piece = self._tokenizer.token_bytes(token_id, first=self._first)
        self._first = False
        text = self._decoder.decode(piece)
        self._whole = self._ends_whole()
        return text

    def flush(self) -> str:
        """End the text: give U+FFFD for a character that was begun and not ended, else nothing."""
        return self._decoder.decode(b"", final=True)

    def _ends_whole(self) -> bool:
        """Whether the text so far ends with a whole character, so that what follows stands for itself."""
        return not self._decoder.getstate()[0]

    def _tail(self, prompt_ids: Sequence[int]) -> bytes | None:
        """Give the prompt's last bytes, enough for any unfinished character; None if no token has text."""
        tail = None
        for token_id in reversed(prompt_ids):
            if not self._tokenizer.is_special(token_id):
                tail = self._tokenizer.token_bytes(token_id) + (tail or b"")
                if len(tail) >= 4:
                    break
        return tail
