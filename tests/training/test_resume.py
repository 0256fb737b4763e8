"""What must not have changed when a run is continued."""

from typing import Any

import pytest

from advmoe.errors import UserError
from advmoe.training.resume import check_unchanged


def test_a_run_goes_on_only_with_its_teacher_and_its_generated_images(tiny: Any) -> None:
    config = tiny(teacher="runs/teacher", generated="images.npz")
    digests = {"teacher": "t1", "generated": "g1"}
    for row in ({}, {"epoch": 1}, {"epoch": 1, **digests}):  # rows of older versions have no digests
        check_unchanged(config, digests, row)
    with pytest.raises(UserError, match=r"^teacher runs/teacher: its weights have changed since the run began$"):
        check_unchanged(config, digests, {**digests, "teacher": "t2"})
    with pytest.raises(UserError, match=r"^generated images\.npz: its images have changed since the run began$"):
        check_unchanged(config, digests, {**digests, "generated": "g2"})
