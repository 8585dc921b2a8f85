"""`python -m hpclr`, the same as `hpclr`; what torchrun starts."""

from hpclr.cli import main

main()
