"""python -m turboquant.cli"""

from turboquant.cli import app

app()
