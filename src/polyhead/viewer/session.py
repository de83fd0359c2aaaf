"""Session of the live page: one model, one text at a time, some heads switched off."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from polyhead.errors import PolyheadError
from polyhead.look.ablate import How
from polyhead.look.layers import Head
from polyhead.look.page import payload, render
from polyhead.models.load import LoadedModel
from polyhead.viewer.reader import Progress, Reading, compare_next, read

__all__ = ["BusyError", "Session", "StoppedError"]


class BusyError(PolyheadError):
    """The model is reading another text."""


class StoppedError(PolyheadError):
    """The reading was stopped because the server stops."""


class Session:
    """Readings by one model. Of several concurrent requests, one is served and the others raise.

    Args:
        loaded: the model.
        text: the first text.
        most: the most tokens of a text.
        progress: called during the first reading.

    Raises:
        ArgumentError, ShapeError: as for `read`, for the first text.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        text: str,
        most: int,
        progress: Progress = lambda step, share: None,
    ) -> None:
        self._loaded = loaded
        self._most = most
        self._one_at_a_time = threading.Lock()
        self._stopped = threading.Event()
        self._text = text
        self._whole = read(text, loaded, most=most, progress=progress)
        self.page = render(self._whole.report, live=True)
        self._first = {"text": text, "most": most, "next": self._next(self._whole)}

    def stop(self) -> None:
        """End the current reading at its next layer, and refuse further ones."""
        self._stopped.set()

    def start(self) -> dict[str, Any]:
        """Initial state of the page: its text, its token limit, the next tokens."""
        return self._first

    def answer(self, text: str, off: Collection[Head], how: How) -> dict[str, Any]:
        """Read a text without some heads; next tokens are compared with those of all heads.

        Raises:
            BusyError: another text is being read.
            StoppedError: `stop` was called.
            ArgumentError, ShapeError: as for `read`.
        """
        if not self._one_at_a_time.acquire(blocking=False):
            raise BusyError("the model is reading another text; try again in a moment")
        try:
            if self._text != text:
                whole = self._read(text)
                self._text, self._whole = text, whole
            seen = self._read(text, off, how) if off else self._whole
            return {"payload": payload(seen.report), "next": self._next(seen)}
        finally:
            self._one_at_a_time.release()

    def _read(self, text: str, off: Collection[Head] = (), how: How = "zero") -> Reading:
        return read(
            text, self._loaded, off=off, how=how, most=self._most, progress=self._check_not_stopped
        )

    def _check_not_stopped(self, step: str, share: float) -> None:
        if self._stopped.is_set():
            raise StoppedError("the server stops")

    def _next(self, seen: Reading) -> list[dict[str, Any]]:
        before, after = self._whole.next_token, seen.next_token
        return [asdict(token) for token in compare_next(before, after, self._loaded.tokenizer)]
