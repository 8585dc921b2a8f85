"""`python -m hpclr`, the same as `hpclr`; what torchrun starts."""

from hpclr.cli import main

if __name__ == "__main__":  # worker processes import this file too
    main()
