"""How a script ends that a signal ends."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Signals:
    """The first SIGINT, SIGTERM or SIGHUP ends the program with 128 + its number; later ones do not disturb the ending.

    It comes as SystemExit, so that what was started can be ended, and what was found be shown.
    """

    def __init__(self) -> None:
        self.held = False
        self.first = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.first:
            self.first = number
            if not self.held:
                raise SystemExit(128 + number)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Put the ending off, so that it cannot fall between starting a process and noting it, or into stopping it."""
        before = self.first
        self.held = True
        try:
            yield
        finally:
            self.held = False
        if self.first != before:
            raise SystemExit(128 + self.first)
