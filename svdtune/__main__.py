"""`python -m svdtune`, the command line, as launchers want it."""

from svdtune.cli import main

if __name__ == "__main__":
    main()
