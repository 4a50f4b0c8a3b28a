"""Reference statistics that suites refer to, and the script that makes them."""
