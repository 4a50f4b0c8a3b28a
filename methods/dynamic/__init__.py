"""Less of the network, where less will do: fewer blocks, an early exit, a lower resolution."""
