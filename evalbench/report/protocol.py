"""The protocol of comparable numbers in a sentence: what a caption must say so that they can be compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from evalbench.report.view import Block
from evalbench.spec import noise_words

_SHORT = 12  # hex digits of a hash


def protocol_words(blocks: Iterable[Block], metrics: Iterable[str] = ()) -> str:
    """Suite, N, guidance, seeds, noise, dtype, grid, references of the metrics, and the fingerprint.

    Facts that differ between the blocks are listed: `guidance 1 and 3`.
    """
    held, wanted = list(blocks), list(metrics)
    phrases = [_phrases(block, wanted) for block in held]
    keys = dict.fromkeys(key for found in phrases for key in found)
    texts = {key: list(dict.fromkeys(found[key] for found in phrases if found.get(key))) for key in keys}
    return "; ".join(f"{key} {_joined(found)}".strip() for key, found in texts.items() if found)


def _phrases(block: Block, metrics: Iterable[str]) -> dict[str, str]:
    facts = block.facts
    sampling = _table(_table(facts, "generation"), "sampling") or _table(facts, "generation")
    references = {metric: _reference(facts, metric) for metric in metrics}
    return {
        "suite": f"{block.suite} v{block.version}",
        "N =": str(block.samples) if block.samples else "",
        "guidance": f"{block.guidance:g}",
        "seed" if len(block.seeds) == 1 else "mean of seeds": ", ".join(map(str, block.seeds)),
        "noise": noise_words(str(sampling.get("noise", ""))),
        "dtype": str(sampling.get("dtype", "")),
        "time grid": str(sampling.get("grid", "")),
        **{f"reference of {metric}": found for metric, found in references.items()},
        "protocol": block.protocol[:_SHORT],
    }


def _reference(facts: Mapping[str, Any], metric: str) -> str:
    """The start of the reference's SHA-256; empty where the metric has none in a file."""
    name, _, extractor = metric.partition("@")
    key = f"converged/{extractor}" if "converged" in name else extractor
    return str(_table(facts, "references").get(key, ""))[:_SHORT]


def _table(facts: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = facts.get(key)
    return found if isinstance(found, Mapping) else {}


def _joined(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
