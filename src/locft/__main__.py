"""Lets `python -m locft` be the command line."""

from locft.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
