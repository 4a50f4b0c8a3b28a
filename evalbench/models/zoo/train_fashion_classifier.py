"""Train `fashion-classifier`, which checks whether a sample shows its label, on the Fashion-MNIST training images.

python -m evalbench.models.zoo.train_fashion_classifier --data FOLDER
"""

from __future__ import annotations

import time

from torch.nn import functional as F

from evalbench.models.nets import FashionClassifier
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

RECIPE = Recipe(epochs=10, batch=128, seed=1728, rate=4e-3, decay=1e-2, shift=1)


def main() -> None:
    """Train, write the weights and their card."""
    args, recipe = arguments(__doc__, RECIPE)
    started = time.perf_counter()
    trained = FashionClassifier(norm=True)
    curve, steps = fit(
        trained, lambda images, labels: F.cross_entropy(trained(images), labels), train_data(args.data), recipe
    )
    seconds = time.perf_counter() - started
    file = args.out / "fashion-classifier.safetensors"
    weights = fold(trained)
    save_half(weights, file)
    stored = FashionClassifier()
    stored.load_state_dict({name: tensor.half().float() for name, tensor in weights.items()})
    stored.eval()
    images, labels = test_data()
    facts = {
        "what": "CNN classifier; for label accuracy, apart from fashion64",
        "parameters": sum(weight.numel() for weight in stored.parameters()),
        "steps": steps,
        "seconds": round(seconds, 1),
        "test_accuracy": accuracy(stored, (images, labels)),
        "test_images": len(labels),
        "ms_per_image_1_thread_batch_256": round(milliseconds(stored, images[:256]), 4),
        "loss_curve": curve,
    }
    write_card(file.with_suffix(".json"), file, recipe, facts)


if __name__ == "__main__":
    main()
