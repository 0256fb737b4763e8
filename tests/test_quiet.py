import logging

import pytest

from advmoe.quiet import quiet


def test_warnings_are_hidden_inside_the_block_only(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("some library")
    logger.setLevel(logging.WARNING)
    with quiet("some library"):
        logger.warning("hidden")
        logger.error("an error")
    logger.warning("printed")
    assert caplog.messages == ["an error", "printed"]
