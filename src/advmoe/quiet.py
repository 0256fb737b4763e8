"""Hide the warnings that a library logs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(library: str | None = None) -> Iterator[None]:
    """Inside the block the logger named `library` (by default the root logger) logs errors only."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
