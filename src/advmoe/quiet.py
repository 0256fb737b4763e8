"""Libraries that say more than a person needs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(library: str | None = None) -> Iterator[None]:
    """Only errors of the logger named `library` (by default the root's) are told inside."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
