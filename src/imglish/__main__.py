"""`python -m imglish`, the form that `torchrun -m` needs."""

from imglish.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
