"""`python -m advmoe` and the `advmoe` command."""

import sys


def run() -> None:
    """Run the command line; an interrupt ends it quietly even while torch is being loaded."""
    try:
        from advmoe.cli import main  # noqa: PLC0415

        raise SystemExit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    run()
