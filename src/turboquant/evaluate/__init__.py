"""The measuring instruments: functions that return rows (lists of plain dictionaries)."""

from turboquant.evaluate.errors import EvaluateError
from turboquant.evaluate.fidelity import fidelity
from turboquant.evaluate.longcontext import needle

__all__ = ["EvaluateError", "fidelity", "needle"]
