"""`python -m refrag_lightning`."""

from refrag_lightning.cli import main

main()
