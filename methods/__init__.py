"""Registered methods, one file each, in folders by family; ask the registry, never import them by name."""
