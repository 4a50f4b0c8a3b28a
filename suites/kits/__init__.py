"""Replication kits: one manifest each, read by `evalbench replicate`."""
