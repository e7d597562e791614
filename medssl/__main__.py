"""`python -m medssl`, which torchrun needs."""

from medssl.cli.main import main

if __name__ == "__main__":
    main()
