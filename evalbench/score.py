"""Score images that exist already: `evalbench score`, and `score_images` for Python.

The same extractors and metrics as a run, fed from files. Features are streamed; pixels are never held as a whole.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evalbench import registry
from evalbench.errors import BadSamples, UserError, some
from evalbench.images_in import (
    Images,
    Seen,
    Source,
    npz_keys,
    open_source,
    read_captions,
    read_labels,
    sample_batches,
    stem,
)
from evalbench.interfaces import Extractor, Metric, Value
from evalbench.metrics.common import value_of
from evalbench.metrics.curve import Curve, curve, parse_sizes
from evalbench.metrics.differences import mean_difference
from evalbench.metrics.frechet import FrechetDistance
from evalbench.metrics.persample import PerSampleScore
from evalbench.reference_files import Reference, is_foreign, of_images, read_reference
from evalbench.sample_plan import SamplePlan, read_plan
from evalbench.stats import wilson_interval


@dataclass(frozen=True)
class Score:
    """One metric's value, with what a table needs to show it."""

    metric: str
    value: Value
    unit: str
    higher_is_better: bool


@dataclass(frozen=True)
class PairedScore:
    """A per-sample score against that of the baseline, image by image.

    Attributes:
        difference: mean of images minus baseline. win_rate: share of pairs in which the image is better, ties as half.
    """

    metric: str
    difference: Value
    win_rate: Value


@dataclass(frozen=True)
class ScoreResult:
    """Scores of one set of images.

    Attributes:
        scores: in the order the metrics were asked for. n: images.
        protocol: what makes the numbers comparable: `features` (extractor -> fingerprint), `source` and `references`
            (name, digest, facts). notes: what must stand beside every number.
        curves: each metric over N, where sizes were asked for.
        pairs: per-sample scores against a baseline; empty without one.
    """

    scores: tuple[Score, ...]
    n: int
    protocol: Mapping[str, Any]
    notes: tuple[str, ...]
    curves: tuple[Curve, ...] = ()
    pairs: tuple[PairedScore, ...] = ()

    def __getitem__(self, metric: str) -> Value:
        """The value of a metric id."""
        return {score.metric: score.value for score in self.scores}[metric]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        return {
            "n": self.n,
            "scores": [
                {
                    "metric": score.metric,
                    **dataclasses.asdict(score.value),
                    "unit": score.unit,
                    "higher_is_better": score.higher_is_better,
                }
                for score in self.scores
            ],
            "pairs": [dataclasses.asdict(pair) for pair in self.pairs],
            "protocol": dict(self.protocol),
            "notes": list(self.notes),
            "curves": [dataclasses.asdict(curve) for curve in self.curves],
        }


def score_images(
    source: Images,
    *,
    reference: Images | None,
    metrics: Sequence[str],
    labels: Sequence[int] | None = None,
    captions: Mapping[str, str] | None = None,
    baseline: Images | None = None,
    allow_small_n: bool = False,
    sizes: Sequence[int] = (),
    plan: SamplePlan | None = None,
) -> ScoreResult:
    """Quality of images that exist already.

    Args:
        source: a folder, a .zip, an .npz (`arr_0`), or an iterable of uint8 arrays.
        reference: statistics (.safetensors of evalbench, .npz with mu and sigma), or images as `source`; None where
            no metric needs one.
        metrics: ids such as `fd@fashion64`. labels: the class of each image in order, for `accuracy`; None takes what
            an ADM npz says.
        captions: the text of each image by its id, for `clip` and rewards.
        baseline: images of the same ids as `source`, for `psnr`, `ssim`, `lpips` and paired differences of scores.
        allow_small_n: compute set distances below their least N, marked.
        sizes: also compute every metric from so many of the images, with the line in 1 / N (`metrics/curve.py`).
        plan: what images and classes must be there; anything else is an error.

    Raises:
        UserError: anything that was given is wrong; the file is named.
    """
    opened, seen = open_source(source), Seen()
    labels = opened.labels if labels is None else labels
    beside = {"labels": labels, "captions": captions, "baseline": baseline}
    wanted = _build(metrics, {name for name, given in beside.items() if given is not None})
    extractors = {name: registry.build_extractor(name) for metric in wanted for name in metric.needs}
    references = _references(reference, wanted, extractors)
    compared = None if baseline is None else _Baseline(baseline, wanted, extractors, labels, captions)
    states: dict[str, Any] = {}
    ids: list[str] = []
    for batch in sample_batches(opened, seen, labels, captions):
        parts = {name: extract(batch).cpu().numpy() for name, extract in extractors.items()}
        for name, rows in parts.items():
            _check_finite(opened, name, rows, seen.ids)
        if plan is not None:
            ids += seen.ids
        if not states:
            _check_dimensions(references, parts)
        if compared is not None:
            parts |= compared.next(seen, parts)
        for metric in wanted:
            state = metric.update(parts)
            states[metric.id] = metric.merge(states[metric.id], state) if metric.id in states else state
    _check(opened, seen)
    if plan is not None:
        plan.check(opened.name, ids, labels)
    if compared is not None:
        compared.check_ended()
    scores = []
    for metric in wanted:
        found = references.get(metric.reference_key)
        arrays = None if found is None else found.arrays
        value = value_of(metric, states[metric.id], arrays, allow_small_n=allow_small_n)
        scores.append(Score(metric.id, value, metric.unit, metric.higher_is_better))
    curves = []
    for metric in wanted if sizes else ():
        found = references.get(metric.reference_key)
        curves.append(curve(metric, states[metric.id], None if found is None else found.arrays, sizes))
    return ScoreResult(
        tuple(scores),
        seen.n,
        _protocol(opened, seen, extractors, references, compared),
        _said(opened, references),
        tuple(curves),
        () if compared is None else compared.pairs(),
    )


def score_command(
    source: str,
    reference: str | None,
    metrics: Sequence[str],
    json_out: bool,
    *,
    labels: str | None = None,
    captions: str | None = None,
    baseline: str | None = None,
    allow_small_n: bool = False,
    sizes: str | None = None,
    plan: str | None = None,
) -> int:
    """`evalbench score`: print a line per metric, or one JSON object.

    Args:
        source, reference, metrics, baseline, allow_small_n: as `score_images`. json_out: print JSON.
        labels: a text file with one class number per line. captions: a JSON object, or lines id<TAB>caption.
        sizes: sample counts of the curves, `1000,2000`. plan: `balanced:10`, or a file of ids (`sample_plan.py`).
    """
    result = score_images(
        source,
        reference=reference,
        metrics=metrics,
        labels=None if labels is None else read_labels(Path(labels)),
        captions=None if captions is None else read_captions(Path(captions)),
        baseline=baseline,
        allow_small_n=allow_small_n,
        sizes=parse_sizes(sizes),
        plan=None if plan is None else read_plan(plan),
    )
    print(json.dumps(result.to_json(), indent=1) if json_out else _table(result, source))
    return 0


class _Baseline:
    """The images that scores are compared with, read in step with the scored ones and paired by id."""

    def __init__(
        self,
        images: Images,
        metrics: Sequence[Metric[Any]],
        extractors: Mapping[str, Extractor],
        labels: Sequence[int] | None,
        captions: Mapping[str, str] | None,
    ) -> None:
        self._source, self._seen, self._extractors = open_source(images), Seen(), extractors
        self._batches = sample_batches(self._source, self._seen, labels, captions)
        self._single = [metric for metric in metrics if isinstance(metric, PerSampleScore)]
        self._paired = sorted({name for metric in metrics if metric.paired for name in metric.needs})
        self._better = {metric.id: metric.higher_is_better for metric in metrics}
        self._scores: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {metric.id: [] for metric in metrics}

    def next(self, seen: Seen, parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays `paired:NAME` of the images that pair with those last seen, whose arrays are `parts`."""
        batch = next(self._batches, None)
        if batch is None or [stem(name) for name in self._seen.ids] != [stem(name) for name in seen.ids]:
            ours = {stem(name) for name in seen.ids} ^ {stem(name) for name in self._seen.ids}
            named = some(sorted(ours)) or "none is left"
            raise UserError(
                f"'{self._source.name}' does not pair with the images: {named}; pairs are matched by id, so give "
                "as many images of the same names"
            )
        theirs = {name: extract(batch).cpu().numpy() for name, extract in self._extractors.items()}
        for metric in self._single:
            self._scores[metric.id].append((metric.per_sample(theirs), metric.per_sample(parts)))
        return {f"paired:{name}": theirs[name] for name in self._paired}

    def check_ended(self) -> None:
        """Raise UserError where the baseline has more images."""
        if next(self._batches, None) is not None:
            raise UserError(f"'{self._source.name}' holds more images than are scored; give as many of the same names")

    @property
    def facts(self) -> dict[str, Any]:
        """For the protocol."""
        return {"name": self._source.name, "n": self._seen.n, "pixels_sha256": self._seen.digest()}

    def pairs(self) -> tuple[PairedScore, ...]:
        """Difference and win rate of every per-sample score."""
        return tuple(self._pair(metric.id) for metric in self._single)

    def _pair(self, metric: str) -> PairedScore:
        base, new = (np.concatenate(blocks) for blocks in zip(*self._scores[metric], strict=True))
        found = mean_difference(base, new, {})
        gain = new - base if self._better[metric] else base - new
        wins = float((gain > 0).mean() + (gain == 0).mean() / 2)
        interval = wilson_interval(wins * len(gain), len(gain))
        return PairedScore(
            metric,
            Value(found.value, found.n, found.se, found.interval.low, found.interval.high),
            Value(wins, len(gain), float(np.sqrt(wins * (1 - wins) / len(gain))), interval.low, interval.high),
        )


# --- parts ----------------------------------------------------------------------------------------------------------


def _build(metrics: Sequence[str], given: set[str]) -> list[Metric[Any]]:
    """The metrics, each of which images can answer with what was given beside them: labels, captions, baseline."""
    if not metrics:
        raise UserError("no metric was asked for; name one, such as --metrics fd@fashion64")
    if len(set(metrics)) != len(metrics):
        raise UserError(f"a metric is asked for twice: {', '.join(metrics)}")
    wanted = [registry.build_metric(metric_id) for metric_id in metrics]
    for metric in wanted:
        if metric.paired and "baseline" not in given:
            raise UserError(
                f"metric '{metric.id}' compares pairs; give --baseline IMAGES of the same names, or for a fine "
                "solution from the same noise use `evalbench run`"
            )
        if metric.reference_key not in ("", *metric.needs):
            raise UserError(f"metric '{metric.id}' needs a reference of the model itself; use `evalbench run`")
        for name in metric.needs:
            extractor = registry.get("extractor", name)
            if extractor.missing():
                raise UserError(extractor.missing())
            needs = set(extractor.needs) if issubclass(extractor, Extractor) else set()
            for what, words in (("captions", "the caption of each image"), ("labels", "the class of each image")):
                if what in needs and what not in given:
                    raise UserError(f"metric '{metric.id}' needs {words}; give --{what} FILE")
    return wanted


def _references(
    given: Images | None, wanted: Sequence[Metric[Any]], extractors: Mapping[str, Extractor]
) -> dict[str, Reference]:
    """The reference of each extractor that a metric compares features of."""
    keys = sorted({metric.reference_key for metric in wanted} - {""})
    if not keys:
        return {}
    if given is None:
        raise UserError(f"metric '{wanted[0].id}' needs a reference; give --reference FILE or a folder of images")
    if isinstance(given, str | Path) and _is_statistics(Path(given)):
        if len([key for key in keys if not _is_spatial(key)]) > 1 or (len(keys) > 1 and Path(given).suffix != ".npz"):
            raise UserError(f"'{given}' holds one kind of features, the metrics need {', '.join(keys)}; give images")
        found = {key: read_reference(Path(given), spatial=_is_spatial(key)) for key in keys}
        return {key: _matching(reference, key, extractors[key]) for key, reference in found.items()}
    if not isinstance(given, str | Path) and len(keys) > 1:
        given = list(given)  # read once per extractor
    return {key: _of_images(given, key, wanted, extractors[key]) for key in keys}


def _of_images(given: Images, key: str, wanted: Sequence[Metric[Any]], extract: Extractor) -> Reference:
    """The reference of images; an ADM npz that also stores Inception's statistics is taken at its word for those.

    Its images may be fewer than what the statistics were made of.
    """
    stored = _stored(given, key)
    compared = [metric for metric in wanted if metric.reference_key == key]
    if stored is not None and all(isinstance(metric, FrechetDistance) for metric in compared):
        return _matching(stored, key, extract)
    found = of_images(given, key, extract=extract)
    if stored is None:
        return found
    return dataclasses.replace(found, arrays={**found.arrays, **stored.arrays}, notes=(*found.notes, *stored.notes))


def _stored(given: Images, key: str) -> Reference | None:
    """Statistics of Inception features that stand beside the images of an npz."""
    if not isinstance(given, str | Path) or not key.startswith("inception:") or Path(given).suffix != ".npz":
        return None
    needed = {"mu_s", "sigma_s"} if _is_spatial(key) else {"mu", "sigma"}
    if "logits" in key.split(":") or not Path(given).is_file() or not needed <= set(npz_keys(Path(given))):
        return None
    return read_reference(Path(given), spatial=_is_spatial(key))


def _is_spatial(key: str) -> bool:
    """Whether an ADM npz keeps the statistics of these features as `mu_s` and `sigma_s`."""
    return key.startswith("inception:") and "spatial" in key.split(":")


def _is_statistics(path: Path) -> bool:
    return path.suffix == ".safetensors" or (path.is_file() and path.suffix == ".npz" and is_foreign(path))


def _matching(reference: Reference, key: str, extract: Extractor) -> Reference:
    """The reference, if it was made by this very extractor as far as anybody can tell."""
    made_by = reference.facts.get("extractor")
    if made_by is not None and made_by != extract.fingerprint():
        raise UserError(
            f"reference '{reference.name}' was made by {made_by}, but features '{key}' are {extract.fingerprint()}"
        )
    return reference


def _check_dimensions(references: Mapping[str, Reference], parts: Mapping[str, np.ndarray]) -> None:
    """A file of unknown provenance may be of another network."""
    for key, reference in references.items():
        dims = parts[key].reshape(len(parts[key]), -1).shape[1]
        for name in {"mean", "features"} & reference.arrays.keys():
            if reference.arrays[name].shape[-1] != dims:
                raise UserError(
                    f"reference '{reference.name}' has {reference.arrays[name].shape[-1]} dimensions, features '{key}' "
                    f"of these images have {dims}; it was made by another network or of another size"
                )


def _check_finite(source: Source, name: str, rows: np.ndarray, ids: Sequence[str]) -> None:
    bad = [ids[i] for i in np.flatnonzero(~np.isfinite(rows.reshape(len(rows), -1)).all(axis=1)).tolist()]
    if bad:
        raise BadSamples(f"'{source.name}': features '{name}' are NaN or infinite for {len(bad)} images ({some(bad)})")


def _check(source: Source, seen: Seen) -> None:
    """Images that no score may be computed from; none is ever dropped."""
    for ids, what in ((seen.constant, "of one grey level"), (seen.repeated, "copies of others")):
        if ids:
            raise UserError(
                f"'{source.name}': {len(ids)} of {seen.n} images are {what} ({some(ids)}); remove or replace them"
            )


def _protocol(
    source: Source,
    seen: Seen,
    extractors: Mapping[str, Extractor],
    references: Mapping[str, Reference],
    baseline: _Baseline | None,
) -> dict[str, Any]:
    compared = {} if baseline is None else {"baseline": baseline.facts}
    return compared | {
        "features": {name: extract.fingerprint() for name, extract in extractors.items()},
        "source": {
            "name": source.name,
            "kind": source.kind,
            "n": seen.n,
            "shape": list(seen.shape),
            "pixels_sha256": seen.digest(),
        },
        "references": {
            key: {"name": found.name, "sha256": found.sha256, "facts": dict(found.facts)}
            for key, found in references.items()
        },
    }


def _said(source: Source, references: Mapping[str, Reference]) -> tuple[str, ...]:
    notes = [f"images: {note}" for note in source.notes]
    notes += [f"reference {found.name}: {note}" for found in references.values() for note in found.notes]
    return tuple(dict.fromkeys(notes))


def _point(value: Value) -> str:
    """One line of a curve."""
    return f"    N = {value.n:<7} {_with_interval(value)}" + (f"  ({value.note})" if value.note else "")


def _table(result: ScoreResult, source: str) -> str:
    """One line per metric: value, interval, bias, note."""
    lines = [f"{source}: {result.n} images"]
    width = max(len(score.metric) for score in result.scores)
    for score in result.scores:
        value, arrow = score.value, "↑" if score.higher_is_better else "↓"
        text = f"  {score.metric:<{width}} {arrow} {_with_interval(value)}"
        if value.bias is not None:
            text += f"  bias {value.bias:+.2g}"
        lines.append(text + f"  {score.unit}" + (f"  ({value.note})" if value.note else ""))
    for curve_ in result.curves:
        lines.append(f"  {curve_.metric} over N: {curve_.limit:.4g} {curve_.slope:+.4g} / N through")
        lines += [_point(value) for value in curve_.values]
    for pair in result.pairs:
        lines.append(
            f"  {pair.metric} - baseline: {_with_interval(pair.difference)}, wins {_with_interval(pair.win_rate)}"
        )
    return "\n".join([*lines, *(f"note: {note}" for note in result.notes)])


def _with_interval(value: Value) -> str:
    interval = f"  [{value.low:.4g}, {value.high:.4g}]" if value.low is not None and value.high is not None else ""
    return f"{value.value:.4g}{interval}"
