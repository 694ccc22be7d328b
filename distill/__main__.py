"""`python -m distill ...` is the console script `distill ...`."""

from distill.main import entry

if __name__ == "__main__":
    entry()
