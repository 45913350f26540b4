"""python -m fedcollm_cli."""

from fedcollm_cli.main import app

app()
