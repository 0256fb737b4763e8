"""The error of a call that must be refused."""

from collections.abc import Callable
from typing import Any

import pytest

from advmoe.errors import UserError


def refusal(call: Callable[..., Any], *arguments: Any, **fields: Any) -> str:
    """The UserError of `call(*arguments, **fields)`, which is one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **fields)
    text = str(caught.value)
    assert len(text.splitlines()) == 1, text
    return text
