"""`python -m advmoe` and the `advmoe` command."""


def run() -> None:
    """Run the command line."""
    from advmoe.cli import main  # noqa: PLC0415

    raise SystemExit(main())


if __name__ == "__main__":
    run()
