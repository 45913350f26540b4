"""The paper as data: its three settings, its tables, and the shapes of its six base models.

Fan et al., Federated Co-tuning Framework for Large and Small Language Models, arXiv 2411.11707. The models'
configurations hold only what decides shapes, so that counts and plans need no network; stored_dtype is the type of the
weights as each checkpoint was published on the hub.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from typing import Any, TypedDict, cast

LABELS = {
    "zero-shot": "Zero-Shot",
    "standalone": "Standalone",
    "fedavg": "FedAvg",
    "fedavg-aux": "FedAvg + D^a",
    "centralized": "Centralized",
    "fedcollm": "FedCoLLM",
}
"""What its tables call the methods; fedavg-aux, which they do not have, is named alike."""


@dataclass(frozen=True)
class Preset:
    """A pair of base models and the LoRA shapes for them."""

    slm: str
    llm: str
    rank: int
    target_modules: tuple[str, ...]


SETTINGS = {
    # These shapes give exactly the transmitted parameters of Table 3.
    "s1": Preset("gpt2", "gpt2-large", 8, ("c_attn",)),
    "s2": Preset("facebook/opt-1.3b", "facebook/opt-6.7b", 16, ("q_proj", "v_proj")),
    "s3": Preset("princeton-nlp/Sheared-LLaMA-1.3B", "meta-llama/Llama-2-7b-hf", 16, ("q_proj", "v_proj")),
}
PRESETS = {"blank": Preset("gpt2", "gpt2-large", 8, ()), **SETTINGS}


@dataclass(frozen=True)
class Checkpoint:
    """A published base model: what decides its shapes, and the type its weights are stored in."""

    model: str
    stored_dtype: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Transmitted:
    """A row of Table 3: millions of parameters of the full model and sent per client and round, and the percentage."""

    model: str
    full_millions: float
    sent_millions: float
    percent: float


class Tables(TypedDict):
    """Tables 1 to 3."""

    source: dict[str, str]  # title, arXiv number, and what each table's figures are
    accuracy: dict[str, dict[str, dict[str, dict[str, float]]]]  # percent, by model, task, method and setting
    transmitted: dict[str, dict[str, Any]]  # Transmitted, by setting


@functools.cache
def tables() -> Tables:
    """The paper's tables, as the file has them."""
    return cast(Tables, json.loads(_folder().joinpath("tables.json").read_text()))


def accuracy(setting: str, model: str, method: str, task: str) -> float | None:
    """Percent, of Table 1 ("llm") or Table 2 ("slm", the mean of the clients'); None where the paper gives none.

    setting: s1, s2, s3. method: zero-shot, standalone, fedavg, centralized, fedcollm. task: lm-eval's name.
    """
    return tables()["accuracy"][model].get(task, {}).get(method, {}).get(setting)


def transmitted(setting: str) -> Transmitted:
    """Table 3's row of this setting."""
    return Transmitted(**tables()["transmitted"][setting])


@functools.cache
def checkpoints() -> dict[str, Checkpoint]:
    """The six base models, by hub id."""
    texts = [path.read_text() for path in _folder().iterdir() if path.name != "tables.json"]
    return {one.model: one for one in (Checkpoint(**json.loads(text)) for text in texts)}


def _folder() -> Traversable:
    return importlib.resources.files("stages.paper") / "data"
