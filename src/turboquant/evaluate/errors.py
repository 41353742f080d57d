"""What the measuring instruments raise when they are asked for something they cannot do."""


class EvaluateError(ValueError):
    """An argument cannot be used; the message names it, what was given and what is allowed."""
