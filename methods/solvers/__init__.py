"""Solvers of the sampling equation: ordinary and stochastic, one step or many."""
