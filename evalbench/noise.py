"""Counter-based noise: the same normal numbers for (seed, sample, use, step), whoever asks and in whatever order.

NumPy's Philox with key = (seed, sample) and counter = (0, 0, use, step); normals are drawn in float64 on the CPU and
cast. So chunk order, position in a batch, worker count and methods that draw different amounts cannot change another
draw, and all methods stay paired (design, section 5). x_T alone may come from elsewhere (`Start`, evalbench.starts).
"""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch

# (run seed, global sample index, shape of a sample) -> unit normals behind its x_T, float32 on the CPU
Start = Callable[[int, int, tuple[int, ...]], torch.Tensor]

START = 0  # the use code of x_T; every other use is named by a word

# Depth of the dyadic Brownian tree: increments longer than 2^-14 of the log-SNR range are exact in law and shared
# by all queries; two query times inside one leaf would be drawn independently of each other.
BROWNIAN_DEPTH = 14
_CACHED_NODES = 64


def use_code(use: str) -> int:
    """A stable number for a named use, never START."""
    return zlib.crc32(use.encode()) + 1


class Philox:
    """One reused NumPy generator, repositioned for each draw (building one per draw costs ten times more)."""

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=np.zeros(2, dtype=np.uint64))
        self._generator = np.random.Generator(self._bits)
        self._state = self._bits.state

    def normal(self, seed: int, sample: int, use: int, step: int, size: int) -> np.ndarray:
        """`size` standard normals, float64, a function of the arguments alone."""
        return self._at(seed, sample, use, step).standard_normal(size)

    def uniform(self, seed: int, sample: int, use: int, step: int, size: int) -> np.ndarray:
        """`size` uniform numbers in [0, 1), float64, a function of the arguments alone."""
        return self._at(seed, sample, use, step).random(size)

    def _at(self, seed: int, sample: int, use: int, step: int) -> np.random.Generator:
        self._state["state"]["key"][:] = (seed, sample)
        self._state["state"]["counter"][:] = (0, 0, use, step)
        self._state["buffer_pos"] = 4  # empty buffer: the next draw starts at the counter
        self._state["has_uint32"] = 0
        self._bits.state = self._state
        return self._generator


class NoiseSource:
    """The random numbers of one batch of samples; the only source of randomness a method has.

    Args:
        seed: run seed, >= 0.
        samples: global sample index of each row.
        shape: shape of one sample, without the batch dimension.
        dtype: dtype of what is returned; draws are float64 before the cast.
        device: where the tensors go. stream: keeps candidates of one sample apart; empty for the first.
        origin: where x_T comes from, of the first candidate alone; None is Philox, as for every other use.
    """

    def __init__(
        self,
        seed: int,
        samples: Sequence[int],
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        stream: str = "",
        origin: Start | None = None,
    ) -> None:
        self.seed, self.samples, self.shape = int(seed), [int(i) for i in samples], tuple(shape)
        self.dtype, self.device, self.stream, self.origin = dtype, torch.device(device), stream, origin
        self._philox = Philox()
        self._size = math.prod(self.shape)
        self._nodes: OrderedDict[int, np.ndarray] = OrderedDict()

    def at(self, samples: Sequence[int], seed: int | None = None) -> NoiseSource:
        """The numbers of other samples, or of another seed: what a method that chooses its noise draws from."""
        seed = self.seed if seed is None else seed
        return NoiseSource(seed, samples, self.shape, self.dtype, self.device, self.stream, self.origin)

    def candidate(self, k: int) -> NoiseSource:
        """The k-th independent source of the same samples; 0 is this one. For searches over noise."""
        stream = f"{self.stream}/{k}" if k else self.stream
        return NoiseSource(self.seed, self.samples, self.shape, self.dtype, self.device, stream, self.origin)

    def start(self) -> torch.Tensor:
        """The unit normals behind x_T, (B, *shape)."""
        if self.stream:
            return self._cast(self._draw(self._code("start"), 0))
        if self.origin is not None:
            rows = [self.origin(self.seed, i, self.shape) for i in self.samples]
            return torch.stack(rows).to(dtype=self.dtype).to(self.device)
        return self._cast(self._draw(START, 0))

    def uniform(self, use: str, step: int = 0) -> torch.Tensor:
        """Fresh uniform numbers in [0, 1) for a named use at a step, (B, *shape)."""
        code = self._code(use)
        return self._cast(np.stack([self._philox.uniform(self.seed, i, code, step, self._size) for i in self.samples]))

    def normal(self, use: str, step: int = 0) -> torch.Tensor:
        """Fresh unit normals for a named use at a step, (B, *shape)."""
        return self._cast(self._draw(self._code(use), step))

    def increment(self, u_from: float, u_to: float) -> torch.Tensor:
        """(W(u_to) - W(u_from)) / sqrt(|u_to - u_from|), (B, *shape): unit normals of one Brownian path per sample.

        The clock u runs over [0, 1] (`Path.fraction`). Because the path is indexed by time, stochastic solvers stay
        paired across step counts.
        """
        if u_from == u_to:
            raise ValueError("a Brownian increment needs two different times")
        difference = self._brownian(u_to) - self._brownian(u_from)
        return self._cast(difference / math.sqrt(abs(u_to - u_from)))

    def _brownian(self, u: float) -> np.ndarray:
        """W(u) by bisection: each node's normal is keyed by its heap index, so any query order gives the same path."""
        if not 0.0 <= u <= 1.0:
            raise ValueError(f"Brownian time {u} outside [0, 1]")
        left, right, node = 0.0, 1.0, 1
        w_left: np.ndarray = np.zeros((len(self.samples), self._size))
        w_right = self._node(0)
        for _ in range(BROWNIAN_DEPTH):
            if u in (left, right):
                break
            middle = 0.5 * (left + right)
            w_middle = 0.5 * (w_left + w_right) + 0.5 * math.sqrt(right - left) * self._node(node)
            if u < middle:
                right, w_right, node = middle, w_middle, 2 * node
            else:
                left, w_left, node = middle, w_middle, 2 * node + 1
        fraction = (u - left) / (right - left)
        bridge = math.sqrt(max((u - left) * (right - u) / (right - left), 0.0))
        value = (1.0 - fraction) * w_left + fraction * w_right
        return value + bridge * self._node(node) if bridge else value

    def _node(self, node: int) -> np.ndarray:
        """Normals of a tree node; the upper levels are asked for again and again, so a few are kept."""
        if node not in self._nodes:
            self._nodes[node] = self._draw(self._code("brownian"), node)
            if len(self._nodes) > _CACHED_NODES:
                self._nodes.popitem(last=False)
        self._nodes.move_to_end(node)
        return self._nodes[node]

    def _code(self, use: str) -> int:
        return use_code(f"{self.stream}:{use}" if self.stream else use)

    def _draw(self, use: int, step: int) -> np.ndarray:
        rows = [self._philox.normal(self.seed, i, use, step, self._size) for i in self.samples]
        return np.stack(rows)

    def _cast(self, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values.reshape(len(self.samples), *self.shape))
        return tensor.to(dtype=self.dtype).to(self.device)
