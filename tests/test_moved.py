from importlib import import_module

import pytest

from advmoe.moved import MOVED


@pytest.mark.parametrize(("module", "former", "present"), [(m, *pair) for m, names in MOVED.items() for pair in names.items()])
def test_a_former_name_is_refused_with_its_present_one(module, former, present):
    with pytest.raises(ImportError, match=rf"^{module}.{former} is now {present}$"):
        getattr(import_module(module), former)
    with pytest.raises(ImportError, match=rf"is now {present}$"):
        exec(f"from {module} import {former}")


@pytest.mark.parametrize("module", MOVED)
def test_other_names_are_unknown(module):
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
        import_module(module).nothing  # noqa: B018


@pytest.mark.parametrize("module", ["advmoe", "advmoe.evaluation"])
def test_names_that_are_imported_later_are_listed(module):
    listed = dir(import_module(module))
    assert {*import_module(module).__all__, "__name__"} <= set(listed)


@pytest.mark.parametrize("present", sorted({name for names in MOVED.values() for name in names.values()}))
def test_the_present_names_exist(present):
    try:
        import_module(present)
    except ImportError:
        module, _, name = present.rpartition(".")
        assert hasattr(import_module(module), name)
