"""`python -m infra.cli` is `pigeon`."""

from infra.cli import main

main()
