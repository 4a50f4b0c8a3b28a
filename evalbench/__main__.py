"""`python -m evalbench`."""

from evalbench.cli import main

main()
