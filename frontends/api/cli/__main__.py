"""`python -m paring.cli`: the same as the command `paring`."""

from paring.cli import main

main()
