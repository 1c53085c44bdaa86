"""`python -m ganglion.cli` is the `ganglion` command."""

from ganglion.cli.main import main

if __name__ == "__main__":
    main()
