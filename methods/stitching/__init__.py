"""Several models along one trajectory."""
