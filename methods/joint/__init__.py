"""Joint models of several modalities: marginals, conditionals and the joint from one network."""
