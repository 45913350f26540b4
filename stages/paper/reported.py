"""Two papers as data: FedCoLLM's three settings and tables, FedMKT's setting and tables, and base models' shapes.

Fan et al., Federated Co-tuning Framework for Large and Small Language Models, arXiv 2411.11707; Fan et al., FedMKT,
arXiv 2406.02224 v4. The models' configurations hold only what decides shapes, so that counts and plans need no network;
stored_dtype is the type of the weights as each checkpoint was published on the hub.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from typing import Any, Literal, TypedDict, cast

FEDCOLLM, FEDMKT = "tables.json", "fedmkt.json"
"""The files with the papers' tables; every other one in data/ is a base model's configuration."""

LABELS = {
    "zero-shot": "Zero-Shot",
    "standalone": "Standalone",
    "standalone-public": "Standalone + D_p",
    "fedavg": "FedAvg",
    "fedprox": "FedProx",
    "fedavgm": "FedAvgM",
    "fedadagrad": "FedAdagrad",
    "fedadam": "FedAdam",
    "fedyogi": "FedYogi",
    "fedavg-aux": "FedAvg + D^a",
    "llm2slm": "LLM2SLM",
    "centralized": "Centralized",
    "fedcollm": "FedCoLLM",
    "fedmkt": "FedMKT",
}
"""What their tables call the methods; fedavg-aux and standalone-public, which they do not have, are named alike."""

Setting = Literal["s1", "s2", "s3", "mkt-heterogeneous", "mkt-s1", "mkt-s2", "mkt-one-to-one-s1", "mkt-one-to-one-s2"]
"""The settings that accuracies are reported in: FedCoLLM's, and FedMKT's."""


@dataclass(frozen=True)
class Preset:
    """A pair of base models and the LoRA shapes for them.

    own: with FedMKT the clients' own models, each with its learning rate, in the order of clients.
    """

    slm: str
    llm: str
    rank: int
    target_modules: tuple[str, ...]
    own: tuple[tuple[str, float], ...] = ()


SETTINGS: dict[str, Preset] = {
    # These shapes give exactly the transmitted parameters of Table 3.
    "s1": Preset("gpt2", "gpt2-large", 8, ("c_attn",)),
    "s2": Preset("facebook/opt-1.3b", "facebook/opt-6.7b", 16, ("q_proj", "v_proj")),
    "s3": Preset("princeton-nlp/Sheared-LLaMA-1.3B", "meta-llama/Llama-2-7b-hf", 16, ("q_proj", "v_proj")),
}
# FedMKT's Appendix D; for its LLaMa2-1.3B it says: as for the LLM.
OWN = (("gpt2-xl", 3e-4), ("facebook/opt-1.3b", 3e-5), ("bigscience/bloom-1b1", 3e-5), (SETTINGS["s3"].slm, 3e-5))
PRESETS = {
    "blank": Preset("gpt2", "gpt2-large", 8, ()),
    **SETTINGS,
    "mkt": Preset(SETTINGS["s3"].slm, SETTINGS["s3"].llm, 8, (), OWN),
}


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
    """FedCoLLM's Tables 1 to 3."""

    source: dict[str, str]  # title, arXiv number, and what each table's figures are
    accuracy: dict[str, dict[str, dict[str, dict[str, float]]]]  # percent, by model, task, method and setting
    transmitted: dict[str, dict[str, Any]]  # Transmitted, by setting


@dataclass(frozen=True)
class Accuracies:
    """What a paper reports in one of its settings.

    source: title, arXiv number, table, what the figures are. slms: the clients' base models, one for all or one each.
    accuracy: percent, by model, task and method. A model is "llm", "slm" (the mean of the clients'), or the name in
    slms of a client's own.
    """

    source: dict[str, str]
    slms: tuple[str, ...]
    llm: str
    accuracy: dict[str, dict[str, dict[str, float]]]

    @property
    def tasks(self) -> list[str]:
        """As lm-eval names them."""
        return list(self.accuracy["llm"])


@functools.cache
def tables() -> Tables:
    """FedCoLLM's tables, as the file has them."""
    return cast(Tables, json.loads(_folder().joinpath(FEDCOLLM).read_text()))


@functools.cache
def accuracies(setting: Setting) -> Accuracies:
    """FedCoLLM's Tables 1 and 2 in one of its settings, or FedMKT's Table 2, 3 or 4."""
    if preset := SETTINGS.get(setting):
        found = {
            model: {
                task: {method: by_setting[setting] for method, by_setting in methods.items()}
                for task, methods in tasks.items()
            }
            for model, tasks in tables()["accuracy"].items()
        }
        return Accuracies(tables()["source"], (preset.slm,), preset.llm, found)
    fedmkt = json.loads(_folder().joinpath(FEDMKT).read_text())
    own = fedmkt["settings"][setting]
    source = fedmkt["source"] | {"table": own["table"]}
    return Accuracies(source, tuple(own["slms"]), own["llm"], own["accuracy"])


def accuracy(setting: Setting, model: str, method: str, task: str) -> float | None:
    """Percent, of a model as Accuracies names it; None where the paper gives none.

    method: a key of LABELS. task: lm-eval's name.
    """
    return accuracies(setting).accuracy.get(model, {}).get(task, {}).get(method)


def transmitted(setting: str) -> Transmitted:
    """Table 3's row of this setting."""
    return Transmitted(**tables()["transmitted"][setting])


@functools.cache
def checkpoints() -> dict[str, Checkpoint]:
    """The papers' eight base models, by hub id."""
    texts = [path.read_text() for path in _folder().iterdir() if path.name not in (FEDCOLLM, FEDMKT)]
    return {one.model: one for one in (Checkpoint(**json.loads(text)) for text in texts)}


def _folder() -> Traversable:
    return importlib.resources.files("stages.paper") / "data"
