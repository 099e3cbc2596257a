"""Entry point of `python -m jaxjd.demo`."""

from jaxjd.demo.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
