"""Any-order autoregression as a sampler (Ou et al., RADD, section on AO-ARMs): a fixed number of tokens at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from evalbench.interfaces import Cond, Denoiser, Solver
from evalbench.registry import register

from .radd import reveal

if TYPE_CHECKING:
    import torch

    from evalbench.noise import NoiseSource

Order: TypeAlias = Literal["random", "left-to-right"]


@register("any-order")
@dataclass(frozen=True)
class AnyOrder(Solver):
    """Any-order autoregressive sampling: L / NFE tokens per evaluation, in a random or fixed order.

    n = min(NFE, L) evaluations, each of which reveals L / n tokens (rounded down or up) from the same state; with
    NFE >= L one token at a time, which is exact for exact conditionals. Every sample spends the same, while in `radd`
    chance decides how many tokens an evaluation reveals.

    Attributes:
        order: `random`, another for every sample, or `left-to-right`.
    """

    requires = frozenset({"tokens"})

    order: Order = "random"

    def sample(self, denoiser: Denoiser, x_T: torch.Tensor, cond: Cond, nfe: int, noise: NoiseSource) -> torch.Tensor:
        import torch

        B, L = x_T.shape
        n = min(nfe, L)
        place = torch.arange(L, device=x_T.device).expand(B, L)
        if self.order == "random":
            place = noise.uniform("reveal").argsort(1).argsort(1)  # the rank of each token
        at = denoiser.path.t_start * (1.0 - torch.arange(n, dtype=torch.float64, device=x_T.device) / n)
        return reveal(denoiser, x_T, cond, place * n // L, at.expand(B, n), noise)
