"""Suites: one TOML file each, facts only, and the prompt lists they name."""
