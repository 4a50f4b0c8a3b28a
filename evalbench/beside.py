"""Calls beside a loop: in a thread of their own, one at a time, in the order they were given."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def at_once(call: Callable[[], T]) -> Future[T]:
    """A call that is made at once, by whoever asks."""
    future: Future[T] = Future()
    _make(call, future)
    return future


class Beside:
    """A thread for calls; it ends with the block, and no process waits for it to end.

    Args:
        prepare: called first, in the thread.
    """

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._prepare = prepare
        self._left = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *_: object) -> None:
        """What has not begun is not made; what runs is left to itself."""
        self._left.set()
        self._calls.put(None)

    def __call__(self, call: Callable[[], T]) -> Future[T]:
        """Make a call soon; the future has what it returns or raises."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="beside", daemon=True)
            self._thread.start()
        future: Future[T] = Future()
        self._calls.put((call, future))
        return future

    def _run(self) -> None:
        prepared = at_once(self._prepare)
        while (item := self._calls.get()) is not None and not self._left.is_set():
            call, future = item
            if error := prepared.exception():  # nobody would meet it here, and all would wait for their results
                future.set_exception(error)
            else:
                _make(call, future)


def _make(call: Callable[[], T], future: Future[T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except Exception as error:  # whoever asks for the result meets it
        future.set_exception(error)
