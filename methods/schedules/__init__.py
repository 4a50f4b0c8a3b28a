"""Schedules: where on the noise path a solver spends its evaluations."""
