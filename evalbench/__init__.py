"""Benchmark diffusion and flow sampling methods: how good, how sure, at what cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from evalbench.api import run as run
    from evalbench.registry import register as register
    from evalbench.report import load as load

__all__ = ["__version__", "load", "register", "run"]


def __getattr__(name: str) -> Any:
    """The Python interface, imported on first use: the command line must start fast."""
    if name == "run":
        from evalbench.api import run

        return run
    if name == "register":
        from evalbench.registry import register

        return register
    if name == "load":
        from evalbench.report import load

        return load
    raise AttributeError(f"module 'evalbench' has no attribute '{name}'")
