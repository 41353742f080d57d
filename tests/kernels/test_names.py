"""No submodule of a backend takes the name of one of its ops."""

import importlib
import pkgutil

import pytest

from turboquant.kernels import ops


@pytest.mark.parametrize("name", ops.BACKENDS)
def test_ops_stay_callable_after_all_submodules_are_imported(name):
    """Importing a submodule binds its name in the package: one called like an op would take the op's place."""
    backend = importlib.import_module(f"turboquant.kernels.{name}")
    taken = {*ops.OPS, *ops.LINEAR_OPS}
    for module in pkgutil.iter_modules(getattr(backend, "__path__", [])):
        try:
            importlib.import_module(f"{backend.__name__}.{module.name}")
        except ImportError:  # what the submodule needs is not installed here
            continue
    for op in taken:
        assert callable(getattr(backend, op, callable))
