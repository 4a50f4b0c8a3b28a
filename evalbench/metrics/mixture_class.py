"""The class that an analytic mixture itself sees in a sample: the Bayes classifier, no network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from evalbench.errors import UserError
from evalbench.interfaces import Extractor, SampleBatch
from evalbench.registry import register

if TYPE_CHECKING:
    import torch


class _Mixture(Protocol):
    components: int
    classes: int

    def responsibilities(self, x: torch.Tensor) -> torch.Tensor: ...


@register("gmm-class")
class MixtureClass(Extractor):
    """1.0 where the most probable class of an analytic mixture is the label the sample was made for, float64 (B,)."""

    needs = ("x", "labels")

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        labels = batch.cond.labels
        if not hasattr(batch.model, "responsibilities") or not getattr(batch.model, "components", 0):
            raise UserError(
                f"features 'gmm-class' need a mixture with exact classes, and model '{batch.model.name}' is none; "
                "leave accuracy@gmm-class out of --metrics"
            )
        mixture = cast(_Mixture, batch.model)
        if labels is None or not mixture.classes:
            raise UserError("features 'gmm-class' need labels; set [conditions] labels in the suite")
        shares = mixture.responsibilities(batch.x)  # (B, K), component k is of class k mod classes
        classes = shares.view(len(shares), -1, mixture.classes).sum(1)
        seen: torch.Tensor = classes.argmax(1) == labels
        return seen.double()
