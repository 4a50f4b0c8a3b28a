"""What there is and whether it runs here: the rows of `evalbench list`, and `evalbench doctor`."""

from __future__ import annotations

import shutil
from typing import Any

from evalbench import availability, prompts, registry, starts
from evalbench.errors import UserError
from evalbench.interfaces import ExtractorFamily
from evalbench.spec import Suite, load_suite, suite_names
from evalbench.suite_references import why_missing


def rows(kind: str) -> list[dict[str, Any]]:
    """name, summary, requires, available, reason: one row each.

    Args:
        kind: suites, methods or metrics.
    """
    if kind == "suites":
        return [_suite_row(name) for name in suite_names()]
    if kind == "methods":
        return [row for name in registry.names("method") for row in _method_rows(name)]
    return [_metric_row(metric_id) for metric_id in _metric_ids()]


def _suite_row(name: str) -> dict[str, Any]:
    suite = load_suite(name)
    return _row(name, suite.summary, [suite.model.loader], suite_missing(suite))


def suite_missing(suite: Suite) -> str:
    """What a suite lacks on this machine, with the line to type; empty when it can run."""
    reasons = []
    if suite.model.loader == "diffusers":
        try:
            registry.build_model(suite.model.loader, suite.model.options)
        except UserError as error:
            reasons.append(str(error))
    if suite.conditions.prompts is not None:
        reasons.append(prompts.missing(suite.conditions.prompts))
    reasons.append(starts.missing(suite))
    metrics = [registry.build_metric(name) for name in suite.metrics.names]
    usable = [metric for metric in metrics if not any(map(_features_missing, metric.needs))]
    reasons += [why_missing(suite, metric.reference_key) for metric in usable]
    return "; ".join(dict.fromkeys(reason for reason in reasons if reason))


def _features_missing(name: str) -> str:
    return registry.get("extractor", name).missing()


def _method_rows(name: str) -> list[dict[str, Any]]:
    cls = registry.get("method", name)
    requires = sorted(getattr(cls, "requires", ()))
    if not hasattr(cls, "members"):
        return [_row(name, cls.summary(), requires, cls.missing())]
    prefix, members = name.removesuffix("*"), availability.members_of(cls)
    return [_row(f"{prefix}{member}", cls.summary(), requires, reason) for member, reason in members]


def _metric_ids() -> list[str]:
    """The metric ids that the built-in suites use: an id is a protocol, so a bare metric name is not one."""
    suites = [load_suite(name).metrics for name in suite_names()]
    return sorted({metric for metrics in suites for metric in (*metrics.names, *metrics.optional)})


def _metric_row(metric_id: str) -> dict[str, Any]:
    metric = registry.build_metric(metric_id)
    reasons = [registry.get("extractor", part).missing() for part in metric.needs]
    return _row(metric_id, metric.summary(), list(metric.needs), "; ".join(r for r in reasons if r))


def _row(name: str, summary: str, requires: list[str], reason: str) -> dict[str, Any]:
    return {
        "name": name,
        "summary": summary,
        "requires": requires,
        "available": not reason,
        "reason": reason,
    }


def checkup() -> list[tuple[str, bool, str]]:
    """(what, whether it works, what it is or what to type), for `evalbench doctor`."""
    import torch

    from evalbench import __version__, environment

    device = environment.pick_device()
    results = [
        ("evalbench", True, f"{__version__} {environment.git_revision()}".strip()),
        ("torch", True, f"{torch.__version__} on {environment.device_name(device)}"),
        ("gpu", device.type == "cuda", "found" if device.type == "cuda" else "none: runs on the CPU"),
        _importable("ray", "pip install ray"),
        _importable("diffusers", "pip install diffusers"),
        _importable("open_clip", "pip install open_clip_torch"),
        _importable("cleanfid", "pip install clean-fid"),
        ("disk", True, f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free here"),
    ]
    for name in suite_names():
        reason = suite_missing(load_suite(name))
        results.append((f"suite {name}", not reason, reason or "ready"))
    for name in _extractor_names():
        reason = registry.get("extractor", name).missing()
        results.append((f"features {name}", not reason, reason or "ready"))
    return results


def _extractor_names() -> list[str]:
    """Every extractor, families by the members they list."""
    found = []
    for name in registry.names("extractor"):
        cls = registry.get("extractor", name)
        members = cls.members() if issubclass(cls, ExtractorFamily) else ()
        found += [name.replace("*", member) for member in members] if name.endswith(":*") else [name]
    return found


def _importable(module: str, line: str) -> tuple[str, bool, str]:
    from importlib.util import find_spec

    found = find_spec(module) is not None
    return module, found, "importable" if found else line
