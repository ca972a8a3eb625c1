"""`python -m luthier`, also under torchrun."""

from luthier.cli import main

if __name__ == "__main__":
    main()
