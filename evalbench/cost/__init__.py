"""What a method really costs: the evaluation ledger, FLOPs, latency, memory."""
