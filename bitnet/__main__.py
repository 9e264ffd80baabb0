"""The ``bitnet`` command, and ``python -m bitnet``: Ctrl-C is heard before torch is imported."""

from bitnet.shell import start


def main() -> None:
    """The console script."""
    start()
    from bitnet import cli

    cli.main()


if __name__ == "__main__":
    main()
