"""`python -m pipedream_hpc.cli`: the command where its script is not on the path."""

from pipedream_hpc.cli import main

main()
