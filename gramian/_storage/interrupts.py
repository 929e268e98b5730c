"""Ctrl-C and SIGTERM in long computations: answered soon, where nothing is half done, with one line."""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

PATIENCE = 0.5  # seconds a signal waits for `answer()`; then it is answered wherever Python is
_asked: list[int] = []  # signals that wait for an answer
_alarms: list[threading.Timer] = []
_entered = False


@contextlib.contextmanager
def interruptible(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM end the work at the next `answer()`, and print the line `how_to_go_on()`.

    Ctrl-C then raises KeyboardInterrupt, as ever; if nobody catches it, its traceback is left out. SIGTERM ends the
    process, as ever. Handlers that a program has set itself stay, and so does everything outside of the main thread.
    Where several are nested the innermost knows best how to go on. It also decorates functions.
    """
    global _entered
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _entered:
        try:
            yield
            answer()
        except KeyboardInterrupt as stop:
            stop.args = stop.args or (how_to_go_on(),)
            raise
        return
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    ours = {one: handler for one, handler in defaults.items() if signal.getsignal(one) == handler}
    _entered, interrupted = True, False
    for one in ours:
        signal.signal(one, _ask)
    try:
        yield
        answer()
    except KeyboardInterrupt as stop:
        interrupted = True
        _calm()
        line = _Printed(stop.args[0] if stop.args else how_to_go_on())
        print(line, file=sys.stderr, flush=True)
        stop.args = (line,)
        _silence()
        raise
    finally:
        for one, handler in ours.items():
            signal.signal(one, handler)
        _calm()
        asked, _entered = set(_asked), False
        _asked.clear()
        if signal.SIGTERM in asked:
            sys.stdout.flush()
            signal.raise_signal(signal.SIGTERM)
        if asked and not interrupted:  # it came when the work was just done
            raise KeyboardInterrupt


def answer(save: Callable[[], Any] = lambda: None) -> None:
    """Where the work can be left: if a signal waits, saves it and raises KeyboardInterrupt."""
    if _asked and threading.current_thread() is threading.main_thread():
        _calm()
        save()
        raise KeyboardInterrupt


def _ask(number, _) -> None:
    _asked.append(number)
    if len(_asked) > 1:  # asked again, or out of patience
        raise KeyboardInterrupt
    alarm = threading.Timer(PATIENCE, _thread.interrupt_main, (number,))
    alarm.daemon = True
    alarm.start()
    _alarms.append(alarm)


def _calm() -> None:
    while _alarms:
        _alarms.pop().cancel()


class Pace:
    """Cuts a loop of steps into calls of about `seconds`, since no signal is answered within a call.

    The first call takes one step; then they grow while they stay short.
    """

    def __init__(self, seconds: float = 0.25):
        self._seconds, self._length, self._start = seconds, 1, 0.0

    def calls(self, num_steps: int) -> Iterator[tuple[int, int]]:
        """First and last step of every call; the work of each is done when the next one is asked for."""
        first = 0
        while first < num_steps:
            last = min(first + self._length, num_steps)
            start = time.monotonic()
            yield first, last
            each = max(time.monotonic() - start, 1e-6) / (last - first)
            self._length = max(1, min(2 * self._length, int(self._seconds / each)))
            first = last


class _Printed(str):
    """A message that has been shown."""


class _Hook:
    """For `sys.excepthook`: leaves out the traceback of an interrupt whose line has been printed."""

    def __init__(self, shown):
        self._shown = shown

    def __call__(self, kind, value, trace):
        if not (value.args and isinstance(value.args[0], _Printed)):
            self._shown(kind, value, trace)


def _silence() -> None:
    if not isinstance(sys.excepthook, _Hook):
        sys.excepthook = _Hook(sys.excepthook)
