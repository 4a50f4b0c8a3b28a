"""Methods with a known outcome, to test the harness itself."""
