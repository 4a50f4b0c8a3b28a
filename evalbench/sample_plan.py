"""What was meant to be sampled, against the images that are there: `evalbench score --plan`.

A plan is `balanced:K`, K classes equally often, or a file that names every image: a JSON object of classes by id, or
lines `id` or `id<TAB>class`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evalbench.errors import UserError, some
from evalbench.images_in import stem

_BALANCED = "balanced:"


@dataclass(frozen=True)
class SamplePlan:
    """What images must be there.

    Attributes:
        classes: the class of each planned id (without suffix), None where only the id is planned; None when any ids do.
        balanced: so many classes, equally often up to one image; 0 when nothing is said.
    """

    classes: Mapping[str, int | None] | None = None
    balanced: int = 0

    def check(self, source: str, ids: Sequence[str], labels: Sequence[int] | None) -> None:
        """Hold the images that were read against the plan.

        Args:
            source: for the message. ids: of all images. labels: the class of each image; None when nobody knows.

        Raises:
            UserError: images are missing or too many, or have other classes; with their ids.
        """
        if self.balanced:
            self._check_balance(source, ids, labels)
        if self.classes is None:
            return
        found = {stem(name) for name in ids}
        missing = sorted(set(self.classes) - found)
        extra = [name for name in ids if stem(name) not in self.classes]
        if missing or extra:
            words = [f"{len(missing)} missing ({some(missing)})"] if missing else []
            words += [f"{len(extra)} not planned ({some(extra)})"] if extra else []
            raise UserError(f"'{source}' holds {len(ids)} images, planned are {len(self.classes)}: {', '.join(words)}")
        if labels is None:
            return
        wrong = [
            f"{name} has {label}, not {self.classes[stem(name)]}"
            for name, label in zip(ids, labels, strict=True)
            if self.classes[stem(name)] not in (None, label)
        ]
        if wrong:
            raise UserError(f"'{source}': {len(wrong)} images have another class than planned ({some(wrong)})")

    def _check_balance(self, source: str, ids: Sequence[str], labels: Sequence[int] | None) -> None:
        if labels is None:
            raise UserError(f"--plan {_BALANCED}{self.balanced} needs the class of each image; give --labels FILE")
        by_id = zip(ids, labels, strict=True)
        strangers = [f"{name} has {label}" for name, label in by_id if not 0 <= label < self.balanced]
        if strangers:
            raise UserError(f"'{source}': classes are 0 to {self.balanced - 1}, but {some(strangers)}")
        counts = np.bincount(np.asarray(labels), minlength=self.balanced)
        most, least = int(counts.argmax()), int(counts.argmin())
        if counts[most] - counts[least] <= 1:
            return
        named = [name for name, label in zip(ids, labels, strict=True) if label == most]
        raise UserError(
            f"'{source}': {self.balanced} classes are not equally often among {len(ids)} images: class {most} "
            f"{counts[most]} times ({some(named)}), class {least} {counts[least]} times"
        )


def read_plan(text: str) -> SamplePlan:
    """The plan of `--plan`.

    Raises:
        UserError: it cannot be read.
    """
    if text.startswith(_BALANCED):
        count = text.removeprefix(_BALANCED)
        if not count.isdecimal() or int(count) < 2:
            raise UserError(f"--plan {text}: write {_BALANCED}10 for ten classes equally often, or a file")
        return SamplePlan(balanced=int(count))
    try:
        content = Path(text).read_text("utf-8")
        pairs = json.loads(content, object_pairs_hook=list) if text.endswith(".json") else _lines(content)
        classes = {stem(str(name)): None if label is None else int(label) for name, label in pairs}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--plan '{text}': {error}; write lines id or id<TAB>class, or a JSON object") from None
    if len(classes) != len(pairs):
        raise UserError(f"--plan '{text}': an image id stands there twice")
    return SamplePlan(classes)


def _lines(content: str) -> list[tuple[str, str | None]]:
    parts = [line.strip().partition("\t") for line in content.splitlines() if line.strip()]
    return [(name, label if tab else None) for name, tab, label in parts]
