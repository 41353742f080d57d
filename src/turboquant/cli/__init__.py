"""The command line: reads arguments, calls what does the work, prints. No logic; nothing heavy is imported before
its use. Commands are listed in the order in which their files are imported."""

from turboquant.cli.app import app

# isort: off
from turboquant.cli import run  # noqa: F401
from turboquant.cli import measure  # noqa: F401
from turboquant.cli import weights  # noqa: F401
from turboquant.cli import about  # noqa: F401

__all__ = ["app"]
