"""Models: exact mixtures, and networks with the weights shipped in zoo/."""
