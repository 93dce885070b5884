"""`python -m capipe.pipeline` is `capipe`."""

from .cli import main

main()
