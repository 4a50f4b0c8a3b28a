"""Train `fashion64`, the feature network of the quick suites, on the Fashion-MNIST training images.

python -m evalbench.models.zoo.train_fashion64 --data FOLDER
"""

from __future__ import annotations

import time

from torch.nn import functional as F

from evalbench.models.nets import Fashion64
from evalbench.models.zoo.training import (
    Recipe,
    accuracy,
    arguments,
    fit,
    fold,
    milliseconds,
    save_half,
    test_data,
    train_data,
    write_card,
)

RECIPE = Recipe(epochs=9, batch=128, seed=64, rate=4e-3, decay=1e-2, shift=0)


def main() -> None:
    """Train, write the weights and their card."""
    args, recipe = arguments(__doc__, RECIPE)
    started = time.perf_counter()
    trained = Fashion64(norm=True)
    curve, steps = fit(
        trained, lambda images, labels: F.cross_entropy(trained.logits(images), labels), train_data(args.data), recipe
    )
    seconds = time.perf_counter() - started
    file = args.out / "fashion64.safetensors"
    weights = fold(trained)
    save_half(weights, file)
    stored = Fashion64()
    stored.load_state_dict({name: tensor.half().float() for name, tensor in weights.items()})
    stored.eval()
    images, labels = test_data()
    facts = {
        "what": "CNN classifier, 64 linear features before the ReLU and the head; features for fd@fashion64",
        "parameters": sum(weight.numel() for weight in stored.parameters()),
        "steps": steps,
        "seconds": round(seconds, 1),
        "test_accuracy": accuracy(stored.logits, (images, labels)),
        "test_images": len(labels),
        "ms_per_image_1_thread_batch_256": round(milliseconds(stored, images[:256]), 4),
        "loss_curve": curve,
    }
    write_card(file.with_suffix(".json"), file, recipe, facts)


if __name__ == "__main__":
    main()
