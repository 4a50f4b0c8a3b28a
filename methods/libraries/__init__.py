"""What other libraries bring around the network, by name: caches, guidance."""
