"""Networks of the benchmark suites that are small enough for tests."""

import pytest
from small_backbone import SMALL_RESNET

from advmoe.models import MODELS


@pytest.fixture
def small_networks(monkeypatch):
    """ResNet-18 and WRN-28-10 have two blocks each, for tests in which the measured figures mean nothing."""
    for name in ("resnet18", "wrn28_10"):
        monkeypatch.setitem(MODELS, name, MODELS[SMALL_RESNET])
