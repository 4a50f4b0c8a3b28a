"""Discrete diffusion: tokens that are masked and revealed."""
