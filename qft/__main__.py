"""`python -m qft`."""

from qft.cli import main

main()
