"""Few-step samplers whose networks are trained before sampling."""
