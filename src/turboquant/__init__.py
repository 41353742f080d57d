"""Near-lossless 4-bit inference without calibration: quantizers that follow the activations live.

The public names, each loaded when it is first used. Lazily, because `import turboquant` must do nothing:
torch and transformers take seconds to import and `turboquant --help` needs neither, and a process that never
touches the transformers integration must not have it loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turboquant.evaluate.fidelity import fidelity
    from turboquant.evaluate.longcontext import needle
    from turboquant.integrations.transformers import TurboQuantCache, TurboQuantConfig
    from turboquant.kernels.ops import explain
    from turboquant.maths.tracker import ChannelTracker
    from turboquant.packed.page import PageLayout
    from turboquant.recipe import Recipe, parse_recipe

__version__ = "0.1.0"

_HOME = {
    "Recipe": "turboquant.recipe",
    "parse_recipe": "turboquant.recipe",
    "ChannelTracker": "turboquant.maths.tracker",
    "PageLayout": "turboquant.packed.page",
    "explain": "turboquant.kernels.ops",
    "TurboQuantCache": "turboquant.integrations.transformers",
    "TurboQuantConfig": "turboquant.integrations.transformers",
    "fidelity": "turboquant.evaluate",
    "needle": "turboquant.evaluate",
}

__all__ = [
    "ChannelTracker",
    "PageLayout",
    "Recipe",
    "TurboQuantCache",
    "TurboQuantConfig",
    "__version__",
    "explain",
    "fidelity",
    "needle",
    "parse_recipe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'turboquant' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # next time without this detour
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
