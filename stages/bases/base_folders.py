"""Where the base models lie: machine.toml's own folder, the workspace, or the hub's cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from stages.bases import base_files
from stages.files import faults
from stages.runtime.errors import NotReady
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role

CONFIGURATION = ["*.json", "*.txt", "*.model", "*.jinja"]
WEIGHTS = ("*.safetensors", "*.bin")
"""In the order of preference: pickled weights are taken only where a model has no others."""

NEVER_LOADED = ["*/*", "consolidated.*", "*.onnx*"]
"""Further copies of the weights, as large as those that are loaded."""


def folder(workspace: Workspace, role: Role) -> Path:
    """The base model's folder, fetched from the hub if need be. Raises NotReady if it is not to be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    settings = workspace.agreement.model_of(role)
    if local := own_folder(workspace, role):
        if local.is_dir():
            return local
        mend = f"put the model there, or set {setting(workspace, role)} in machine.toml"
        raise NotReady(f"the {role.upper()}'s folder is not there", where=local, mend=mend)
    try:
        for weights in WEIGHTS:
            found = snapshot_download(
                settings.model,
                revision=settings.revision,
                allow_patterns=[*CONFIGURATION, weights],
                ignore_patterns=NEVER_LOADED,
            )
            if base_files.is_whole(Path(found)):
                break
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        if isinstance(error, OSError) and (error.errno in faults.UNWRITABLE or error.filename):
            raise faults.unwritable_cache(f"the {role.upper()} cannot be put into the hub's cache", error) from error
        mend = (
            f"`{fetched_by(workspace, role)}` where there is a network, "
            f"or set {setting(workspace, role)} in machine.toml to a local folder"
        )
        raise NotReady(
            f"the {role.upper()} {settings.model} is neither here nor on the hub: {error}", mend=mend
        ) from error
    return Path(found)


def own_folder(workspace: Workspace, role: Role) -> Path | None:
    """The local folder that the settings name, there or not; None if they name a model of the hub."""
    model = workspace.agreement.model_of(role).model
    override = workspace.machine.models.of(role, workspace.own_model)
    local = workspace.local(override or model)
    return local if override or local.is_dir() or model.startswith((".", "/", "~")) else None


def setting(workspace: Workspace, role: Role) -> str:
    """The key of machine.toml that says where this machine keeps a model."""
    return f"models.clients.{workspace.own_model}" if role == "slm" and workspace.own_model else f"models.{role}"


def fetched_by(workspace: Workspace, role: Role) -> Command:
    """The command that fetches a model where there is a network."""
    own = workspace.own_model if role == "slm" else None
    return Command("prefetch", client=own) if own else Command("prefetch", model=role)


def fetching(workspace: Workspace, role: Role) -> str:
    """What to do where a model is not here."""
    setting_key = setting(workspace, role)
    return f"`{fetched_by(workspace, role)}` where there is a network, or set {setting_key} in machine.toml"


def whole_folder(workspace: Workspace, role: Role) -> Path | None:
    """The base model's folder if it is here with all its weights; never asks the hub."""
    found = own_folder(workspace, role) or cached(workspace, role)
    return found if found is not None and base_files.is_whole(found) else None


def configuration(workspace: Workspace, role: Role) -> Path | None:
    """A folder that holds at least the base model's config.json; never asks the hub."""
    found = own_folder(workspace, role) or cached(workspace, role)
    return found if found is not None and (found / "config.json").is_file() else None


def cached(workspace: Workspace, role: Role) -> Path | None:
    """The folder of the agreed model in the hub's cache, whole or not; never asks the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    settings = workspace.agreement.model_of(role)
    try:
        return Path(snapshot_download(settings.model, revision=settings.revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):  # not there; or no hub id at all
        return None


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Meanwhile, the hub's libraries take what is in their caches and ask for nothing."""
    from datasets import config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before
