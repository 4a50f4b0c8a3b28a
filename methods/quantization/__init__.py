"""Fake quantisation of a network's weights and activations: what it does to samples, and the bits it would take."""
