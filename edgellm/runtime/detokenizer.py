"""Token ids to text while they arrive: whole characters only, and never a part of a stop string.

`TextStream` turns ids into text, `StopFilter` cuts the text at stop strings, `Detokenizer` is both for one answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

REPLACEMENT = "\ufffd"
_LONG_WINDOW = 32
_CUTS_TRIED = 8


class Decoder(Protocol):
    """The part of `edgellm.runtime.tokenizer.Tokenizer` that is needed here."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that decoding skips."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`."""


class TextDelta(NamedTuple):
    """Text that became final, and the stop string that ended the answer, if one did."""

    text: str
    stopped_by: str | None = None


class TextStream:
    """Incremental decoding: the texts that `push` and `finish` return add up to `decode` of all ids.

    Only a short window of ids is decoded at each step: those since the text last ended on a whole character, after a
    few earlier ones as context, because a decoder may treat the first token of a text in another way. That is constant
    work per token. A character whose bytes are not complete shows as U+FFFD at the end of the window; it waits there
    until the next tokens complete it, or `finish` gives it up. (A SentencePiece byte-fallback decoder rewrites a whole
    run of bytes when a later one makes it invalid; for such input, which is no text, the sum can differ.)
    """

    def __init__(self, decoder: Decoder, *, skip_special_tokens: bool = True) -> None:
        self._decoder = decoder
        self._skip = skip_special_tokens
        self._ignored = decoder.special_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._fresh = 0  # where the ids after the context begin in the window
        self._emitted = 0  # characters of the window's text that are out already

    def push(self, token_id: int) -> str:
        """Text that is final with this token."""
        if token_id in self._ignored:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        final = text.rstrip(REPLACEMENT)
        delta = final[self._emitted :]
        self._emitted = max(self._emitted, len(final))
        if len(final) == len(text):
            self._advance(has_new_text=bool(delta))
        elif len(self._window) >= _LONG_WINDOW:
            delta += self._shorten(text)
        return delta

    def finish(self) -> str:
        """The rest, an incomplete character as U+FFFD."""
        rest = self._decode(self._window)[self._emitted :]
        self._window, self._fresh, self._emitted = [], 0, 0
        return rest

    def _decode(self, token_ids: list[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=self._skip)

    def _advance(self, has_new_text: bool) -> None:
        """Keep only the fresh ids, as the next context; ids without text cannot serve as one."""
        if not has_new_text and self._emitted:
            del self._window[self._fresh :]
            return
        tail = self._window[self._fresh :]
        tail_text = self._decode(tail)
        if tail_text:
            self._window, self._emitted = tail, len(tail_text)
        self._fresh = len(self._window)

    def _shorten(self, text: str) -> str:
        """Text to give up on in a window that does not end, as when a model repeats an invalid byte.

        Cuts the window where the two parts decode to the same text as the whole, that is between two characters, and
        so bounds the work per token.
        """
        for cut in range(len(self._window) - 1, len(self._window) - 1 - _CUTS_TRIED, -1):
            head, tail = self._decode(self._window[:cut]), self._decode(self._window[cut:])
            if tail and head + tail == text and len(head) >= self._emitted:
                delta = head[self._emitted :]
                self._window, self._fresh, self._emitted = self._window[cut:], 0, 0
                return delta
        return ""


class StopFilter:
    """Passes text on up to the first stop string, holding back what may be the beginning of one.

    The stop string that is complete first ends the text; of two that end together, the one that begins first. How the
    text is split into pieces does not matter.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self._longest = max(map(len, self._stop), default=0)

    def push(self, text: str) -> TextDelta:
        """Text that is safe to show, and the stop string that ended it."""
        if not self._stop:
            return TextDelta(text)
        text = self._held + text
        found = [(start + len(s), start, s) for s in self._stop if (start := text.find(s)) >= 0]
        if found:
            _, start, stop = min(found)
            self._held = ""
            return TextDelta(text[:start], stop)
        keep = self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return TextDelta(text[: len(text) - keep])

    def finish(self) -> str:
        """What was held back and is no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(s.startswith(text[-length:]) for s in self._stop):
                return length
        return 0


class Detokenizer:
    """The text of one answer as it grows. `text` is all that was returned so far."""

    def __init__(self, decoder: Decoder, stop: Sequence[str] = (), *, skip_special_tokens: bool = True) -> None:
        self._stream = TextStream(decoder, skip_special_tokens=skip_special_tokens)
        self._filter = StopFilter(stop)
        self._parts: list[str] = []
        self._stopped_by: str | None = None

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._parts)

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Text that the next ids make final. After a stop string nothing more comes."""
        text = ""
        for token_id in token_ids:
            if self._stopped_by is None:
                text += self._pass_on(self._stream.push(token_id))
        return TextDelta(text, self._stopped_by)

    def finish(self) -> TextDelta:
        """The rest of the text at the end of the answer."""
        text = ""
        if self._stopped_by is None:
            text = self._pass_on(self._stream.finish())
        if self._stopped_by is None:
            rest = self._filter.finish()
            self._parts.append(rest)
            text += rest
        return TextDelta(text, self._stopped_by)

    def _pass_on(self, text: str) -> str:
        shown, self._stopped_by = self._filter.push(text)
        self._parts.append(shown)
        return shown
