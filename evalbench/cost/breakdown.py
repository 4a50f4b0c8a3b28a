"""Where the time of a call goes: denoiser, decoder, conditioning, the sampler's arithmetic, and Python.

A breakdown comes from passes of its own. They wait for the device at every border of a span, which a latency never
does, so their total is no latency; it is shown as a split only.

    denoiser      inside networks: guides, small models and rewards too     spans opened by `NetworkDoor`
    decoder       from latents to pixels                                    spans opened around the decoder
    conditioning  text encoders and the like                                spans opened around them
    arithmetic    torch operators that ran outside all spans: updates of the state, guidance's combination, noise put
                  on the device, rounding; each is waited for
    overhead      latency of the same call, unmetered, less the four above: Python, dispatch, launching, random numbers

Overhead is a difference of two passes. On a device that overlaps launching with work the four may sum to more than the
latency; then overhead is 0 and `excess` says by how much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, TypeAlias, get_args

from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode_temporarily

from evalbench.cost.clock import Clock

Part: TypeAlias = Literal["denoiser", "decoder", "conditioning"]
PARTS: tuple[Part, ...] = get_args(Part)
ARITHMETIC, OUTSIDE = "arithmetic", "outside"


class Stopwatch:
    """Exclusive seconds by part: a span inside another stops the outer one's watch.

    Args:
        clock: read at every border, after a wait for the device.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._last: Any = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """A metered call: spans opened inside are added up, and so are operators outside them."""
        if self._open:
            raise RuntimeError("the stopwatch runs already")
        with self._spent_on(OUTSIDE), _Operators(self):
            yield

    @contextmanager
    def span(self, part: Part) -> Iterator[None]:
        """Time from here to the end of the block belongs to `part`, but for spans inside it."""
        if part not in PARTS:
            raise ValueError(f"unknown part '{part}'; known: {', '.join(PARTS)}")
        if not self._open:
            yield
            return
        with self._spent_on(part), _unwatched():
            yield

    @contextmanager
    def _spent_on(self, part: str) -> Iterator[None]:
        self._border()
        self._open.append(part)
        try:
            yield
        finally:
            self._border()
            self._open.pop()

    def _border(self) -> None:
        """Charge the time since the last border to the innermost span."""
        self.clock.wait()
        now = self.clock.mark()
        self.clock.wait()
        if self._open:
            part = self._open[-1]
            self.seconds[part] = self.seconds.get(part, 0.0) + self.clock.seconds(self._last, now)
        self._last = now

    def operator(self, run: Callable[[], Any]) -> Any:
        """Run a torch operator; outside all spans it is arithmetic, inside one it is that span's."""
        if self._open != [OUTSIDE]:
            return run()
        with self._spent_on(ARITHMETIC):
            return run()


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every torch operator to the stopwatch."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stopwatch = stopwatch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.stopwatch.operator(lambda: func(*args, **(kwargs or {})))


def _unwatched() -> AbstractContextManager[Any]:
    """Operators in a network run as they do unmetered, where nobody else watches them: no Python for each of them."""
    watched = isinstance(_get_current_dispatch_mode(), _Operators)
    return _pop_mode_temporarily() if watched else nullcontext()


def span(stopwatch: Stopwatch | None, part: Part) -> AbstractContextManager[None]:
    """A span where a stopwatch is held, nothing where there is none: what a door writes around its calls."""
    return nullcontext() if stopwatch is None else stopwatch.span(part)


@dataclass(frozen=True)
class Breakdown:
    """Seconds of one call by part. They add up to the latency where `excess` is 0.

    Attributes:
        excess: seconds by which the parts, each waited for, exceed the latency of an unmetered call.
        calls: metered calls; each part is the median over them.
    """

    denoiser: float
    decoder: float
    conditioning: float
    arithmetic: float
    overhead: float
    excess: float
    calls: int


def metered(call: Callable[[], object], stopwatch: Stopwatch) -> dict[str, float]:
    """Exclusive seconds by part of one call, which must open its spans on this stopwatch."""
    stopwatch.seconds.clear()
    with stopwatch.running():
        call()
    return dict(stopwatch.seconds)


def breakdown(passes: Sequence[Mapping[str, float]], latency: float) -> Breakdown:
    """The split of a latency, in seconds, by the metered passes of the same call.

    Args:
        passes: what `metered` returned, at least one. latency: median seconds of the unmetered call.
    """
    parts = {name: median(one.get(name, 0.0) for one in passes) for name in (*PARTS, ARITHMETIC)}
    rest = latency - sum(parts.values())
    return Breakdown(**parts, overhead=max(rest, 0.0), excess=max(-rest, 0.0), calls=len(passes))
