"""Linear inverse problems y = H x0 + noise: reconstruction and posterior sampling with a diffusion prior."""
