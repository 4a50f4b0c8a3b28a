"""Metrics as pure functions, and the feature networks they read."""
