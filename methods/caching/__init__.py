"""Work of one step reused in the next."""
