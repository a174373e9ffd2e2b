"""python -m molex: the command line."""

from molex.cli import main

main()
