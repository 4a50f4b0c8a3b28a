"""Write the quality that a network of the zoo reached into its card, and a grid of its samples beside it.

    evalbench run fashion-dit --methods unipc --nfe 20 --out results/runs/fashion-dit
    python -m evalbench.models.references.cards results/runs/fashion-dit

The numbers are those of the run's records, with the suite's floor at the same N; the grid shows the first samples, a
class in each column.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evalbench.models.pipelines import Folder, weights_digest
from evalbench.spec import Record, Suite, load_suite
from evalbench.store import Store

METHOD, NFE = "unipc", 20  # whose samples speak for a network
ROWS, ZOOM = 6, 3


def quality(suite: Suite, record: Record) -> dict[str, Any]:
    """Metrics of a record by id: value, standard error, floor and N."""
    floors = {f.metric: f.value for f in suite.floors if f.what == "floor" and f.samples == record.samples}
    found: dict[str, Any] = {"method": record.cell.method, "nfe": record.cell.nfe, "guidance": record.cell.guidance}
    for name, metric in record.metrics.items():
        if name.startswith("paired"):
            continue
        facts = {"value": metric.value, "se": metric.se, "floor": floors.get(name), "n": metric.n}
        found[name] = {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in facts.items()}
    return found


def grid(store: Store, record: Record, classes: int) -> np.ndarray:
    """The first samples, uint8 (ROWS 32, classes 32): sample i is of class i mod classes."""
    kept = store.images(record.cell.id)
    if kept is None:
        raise SystemExit(f"{store.folder} holds no images of {record.cell.method} at NFE {record.cell.nfe}")
    images = kept[: ROWS * classes, 0]
    rows = images.reshape(ROWS, classes, *images.shape[1:]).transpose(0, 2, 1, 3)
    return rows.reshape(ROWS * images.shape[1], classes * images.shape[2])


def main() -> None:
    """Complete the card of a run's network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    store = Store(parser.parse_args().run)
    records = [r for r in store.records() if (r.kind, r.cell.method, r.cell.nfe) == ("quality", METHOD, NFE)]
    records = [r for r in records if r.status == "ok"]
    if not records:
        raise SystemExit(f"{store.folder} holds no {METHOD} at NFE {NFE}; run the first line of --help")
    suite, record = load_suite(records[-1].cell.suite), records[-1]
    folder = Folder.find(suite.model.options["folder"]).path
    card = json.loads((folder / "card.json").read_text("utf-8"))
    card |= {"sha256": weights_digest(folder), "quality": quality(suite, record)}
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", "utf-8")
    picture = Image.fromarray(grid(store, record, suite.conditions.classes))
    picture.resize((picture.width * ZOOM, picture.height * ZOOM), Image.Resampling.NEAREST).save(folder / "samples.png")
    print(json.dumps(card["quality"], indent=1))


if __name__ == "__main__":
    main()
