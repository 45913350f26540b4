"""The files of a party's own folder that are the same for every agreement: machine.toml, as far as it needs it."""

from __future__ import annotations

import importlib.resources
import re

from stages.workspace.init import contents_of
from stages.workspace.names import MACHINE, PRIVATE

IGNORE = ".gitignore"
IGNORED = f"""# What never leaves this machine.
/{PRIVATE}/
/{MACHINE}
.*.partial/
"""
LINE = re.compile(r"(?:# )?(?:\[(?P<table>[a-z.]+)\]|(?P<key>[a-z_0-9]+) = )")
OF_A_SIMULATION = ("offload_idle", "home")
"""Keys for who plays all parties."""


def machine_toml(client: int | None, *, own_model: bool) -> bytes:
    """machine.toml with every key that this party may want explained, which says that it is no simulation.

    client: its number; None: the server. own_model: whether the client tunes a model of its own.
    """
    text = contents_of(importlib.resources.files("workspace_template"), "")[MACHINE].decode()
    left_out = {("slurm", None), *(("", key) for key in OF_A_SIMULATION)}
    left_out |= {("models", "llm")} if client is not None else set()
    left_out |= {("models", "slm")} if own_model else {("models.clients", None)}
    kept, table, is_kept = [], "", True
    for line in text.splitlines():
        if found := LINE.match(line.lstrip("# ") if line.startswith("# [") else line.replace("#   ", "", 1)):
            table = found["table"] or table
            is_kept = not {(table, None), (table, found["key"])} & left_out
        if line.startswith("# simulation"):
            line = f"{'simulation = false':30} # a party of its own: its rows are its own, and `prepare` is refused"
        elif table == "models.clients":
            line = re.sub(r"^#   [0-9]+ =", f"#   {client} =", line)
        if is_kept or not line:
            kept.append(line)
    text = "\n".join(kept)
    return (re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n").encode()
