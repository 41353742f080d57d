"""python -m turboquant"""

from turboquant.cli import app

app()
