"""What a base model is called: the agreement's name only where what lies here is known to be of that name's shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.bases import base_folders
from stages.paper import reported
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role

NO_SHAPE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Keys of a config.json that may differ between two copies of one model."""

LEFT_OUT = ("num_key_value_heads", "word_embed_proj_dim")
"""Keys that older configurations leave out; they then have the value of another."""


def name_of(workspace: Workspace, role: Role) -> str:
    """As the agreement names it; or, of a folder that it does not name or is not of that name's shape, the folder."""
    agreed, own = workspace.agreement.model_of(role).model, base_folders.own_folder(workspace, role)
    if own is None or _is_named(workspace, role, own):
        return agreed
    if agreed not in reported.checkpoints() and own == workspace.local(agreed):
        return agreed  # it is a folder's name already
    architecture = str(_configuration(own).get("model_type", "of unknown architecture"))
    return f"the local folder {own.name} ({architecture})"


def hub_id(workspace: Workspace, role: Role) -> str | None:
    """The base's name on a hub; None for a local folder, unless it is known to be of that name's shape."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    agreed, own = workspace.agreement.model_of(role).model, base_folders.own_folder(workspace, role)
    try:
        validate_repo_id(agreed)
    except HFValidationError:
        return None
    return agreed if own is None or _is_named(workspace, role, own) else None


def _is_named(workspace: Workspace, role: Role, folder: Path) -> bool:
    """Whether a local folder is known to be of the shape of the model that the agreement names.

    By its configuration: held against the hub's, if that is in the cache, or that of the paper's models. A folder of
    the hub's own cache has its name in its path. Of any other model nothing is known here, so it is not.
    """
    agreed = workspace.agreement.model_of(role).model
    found = _configuration(folder)
    if (cached := base_folders.cached(workspace, role)) and (cached / "config.json").is_file():
        known = {key: value for key, value in _configuration(cached).items() if key not in NO_SHAPE}
        return bool(known) and all(found.get(key) == value for key, value in known.items())
    if checkpoint := reported.checkpoints().get(agreed):
        own = {key: found.get(key, value if key in LEFT_OUT else None) for key, value in checkpoint.config.items()}
        return own == checkpoint.config
    return f"models--{agreed.replace('/', '--')}" in folder.resolve().parts


def _configuration(folder: Path) -> dict[str, Any]:
    """What a folder's config.json says; nothing where it cannot be read, which is told when the model is loaded."""
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
