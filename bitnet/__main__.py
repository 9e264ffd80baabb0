"""The ``bitnet`` command and ``python -m bitnet``. Ctrl-C works before torch is imported."""

from bitnet.cli.shell import start


def main() -> None:
    """Run the console script."""
    start()
    from bitnet.cli import main as cli

    cli.main()


if __name__ == "__main__":
    main()
