"""A random network with the interface of EDM's, for dry runs: x0 of 32 x 32 RGB on the EDM path."""

import torch

from evalbench.models.adapter import Adapter


class Random(torch.nn.Module):
    """Preconditioned as in Karras et al. 2022, table 1, around one random convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """x0, (B, 3, 32, 32)."""
        s = sigma.reshape(-1, 1, 1, 1)
        scale = (s**2 + 0.25).sqrt()
        out: torch.Tensor = 0.25 / scale**2 * x + 0.5 * s / scale * self.body(x / scale)
        return out


def load() -> Adapter:
    """The adapter."""
    return Adapter(Random(), shape=(3, 32, 32), path="edm", predicts="x0")
