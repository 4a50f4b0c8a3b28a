"""Guidance: how condition and network are combined."""
