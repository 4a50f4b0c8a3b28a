"""PSNR, SSIM and LPIPS: how far an image is from its baseline, made from the same noise or of the same name.

psnr        10 log10(255^2 / mean squared error), dB            identical images count as 100 dB
ssim        Wang et al. 2004: 11 x 11 Gaussian window of width 1.5, K = (0.01, 0.03), where it fits
lpips@alex  Zhang et al. 2018 v0.1 with the AlexNet of torchvision; also lpips@vgg, lpips@squeeze
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from evalbench import weights
from evalbench.errors import EvalbenchError, UserError, unknown
from evalbench.interfaces import Extractor, Parts, SampleBatch, Value
from evalbench.metrics.common import Array, Rows, require_samples
from evalbench.metrics.extractors import colour, exact_float32, images_of
from evalbench.metrics.persample import PairedError
from evalbench.registry import register
from evalbench.stats import normal_interval

if TYPE_CHECKING:
    import torch

CEILING = 100.0  # dB
_BATCH = 16
_WINDOW, _WIDTH, _K1, _K2 = 11, 1.5, 0.01, 0.03


@register("images")
class ImagesThemselves(Extractor):
    """The images themselves, uint8 (B, C, H, W)."""

    def __call__(self, batch: SampleBatch) -> torch.Tensor:
        return images_of(batch, self.name)


class ImagePair(PairedError):
    """Mean of a number of an image and its pair, with sd / sqrt(n)."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ("images",)

    def update(self, parts: Parts) -> Rows:
        a, b = parts["images"], parts["paired:images"]
        if a.shape != b.shape:
            raise EvalbenchError(f"metric '{self.id}': images {a.shape} and their pairs {b.shape} differ in shape")
        return Rows((self.scores(a, b),))

    def scores(self, a: np.ndarray, b: np.ndarray) -> Array:
        """One number per pair of uint8 images (B, C, H, W), float64 (B,)."""
        raise NotImplementedError

    def summarise(self, errors: np.ndarray) -> Value:
        require_samples(self.id, len(errors), 2, "a mean with its error", allow_small_n=False)
        value, se = float(errors.mean()), float(np.std(errors, ddof=1) / np.sqrt(len(errors)))
        interval = normal_interval(value, se)
        return Value(value, len(errors), se, interval.low, interval.high)


@register("psnr")
class PSNR(ImagePair):
    """Mean peak signal-to-noise ratio to the paired image, dB; identical images count as 100."""

    unit = "dB"
    higher_is_better = True

    def scores(self, a: np.ndarray, b: np.ndarray) -> Array:
        errors = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2, axis=(1, 2, 3))
        decibels: Array = 10 * np.log10(255.0**2 / np.maximum(errors, 255.0**2 * 10 ** (-CEILING / 10)))
        return decibels


@register("ssim")
class SSIM(ImagePair):
    """Mean structural similarity to the paired image (Wang et al. 2004), 1 for identical images."""

    unit = "similarity"
    higher_is_better = True

    def scores(self, a: np.ndarray, b: np.ndarray) -> Array:
        if min(a.shape[2:]) < _WINDOW:
            raise UserError(f"metric '{self.id}' needs images of at least {_WINDOW} x {_WINDOW}, got {a.shape[2:]}")
        x, y = a.astype(np.float64), b.astype(np.float64)
        mx, my = _blurred(x), _blurred(y)
        vx, vy, cov = _blurred(x * x) - mx * mx, _blurred(y * y) - my * my, _blurred(x * y) - mx * my
        c1, c2 = (_K1 * 255) ** 2, (_K2 * 255) ** 2
        maps = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
        means: Array = maps.mean(axis=(1, 2, 3))
        return means


def _blurred(x: Array) -> Array:
    """Gaussian means where the window fits, (B, C, H - 10, W - 10)."""
    places = np.arange(_WINDOW) - _WINDOW // 2
    window = np.exp(-(places**2) / (2 * _WIDTH**2))
    window /= window.sum()
    for axis in (2, 3):
        x = np.lib.stride_tricks.sliding_window_view(x, _WINDOW, axis=axis) @ window
    return x


# --- LPIPS ----------------------------------------------------------------------------------------------------------

# Trunks of torchvision, whose file names carry the first digits of their digests: torchvision/models/*.py.
_TRUNKS = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}


def trunk(net: str) -> weights.Weights:
    """The ImageNet weights under LPIPS, as torchvision names them."""
    import torchvision

    if net not in _TRUNKS:
        raise unknown("LPIPS network", net, _TRUNKS)
    url = str(getattr(torchvision.models, _TRUNKS[net]).IMAGENET1K_V1.url)
    file = url.rpartition("/")[2]
    return weights.Weights(f"lpips/{file}", how=f"curl -L --create-dirs -o {{folder}}/{file} {url}")


@register("lpips")
class LPIPS(ImagePair):
    """Mean LPIPS v0.1 to the paired image (Zhang et al. 2018): `lpips@alex`, `lpips@vgg`, `lpips@squeeze`."""

    unit = "LPIPS"

    def scores(self, a: np.ndarray, b: np.ndarray) -> Array:
        import torch

        network = lpips_network(self.arg)
        found = []
        with exact_float32(torch.device("cpu")):
            for start in range(0, len(a), _BATCH):
                x, y = (
                    colour(torch.from_numpy(images[start : start + _BATCH])).float() / 127.5 - 1 for images in (a, b)
                )
                found.append(network(x, y).flatten().double().numpy())
        return np.concatenate(found)


@cache
def lpips_network(net: str) -> Any:
    """The network of the `lpips` package with torchvision's trunk from the folder of weights.

    Raises:
        UserError: the package or the trunk is absent.
    """
    import torch

    file = weights.find(trunk(net))
    try:
        import lpips
    except ImportError:
        raise UserError(f"metric 'lpips@{net}' needs a package; type: pip install lpips") from None
    return with_trunk(lpips, net, torch.load(file, map_location="cpu", weights_only=True))


def with_trunk(lpips: Any, net: str, state: dict[str, torch.Tensor]) -> Any:
    """An LPIPS of the package whose trunk has the weights of torchvision's `features`.

    Args:
        lpips: the package. net: alex, vgg or squeeze. state: a state dict of the torchvision network.
    """
    network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    features = {name.removeprefix("features."): value for name, value in state.items() if name.startswith("features.")}
    # the package cuts `features` into slices, `slice2.3.weight`, and keeps the numbers of its layers
    network.net.load_state_dict({key: features[key.partition(".")[2]] for key in network.net.state_dict()})
    return network.eval().requires_grad_(False)
