"""What adapter_config.json says, read as PEFT reads it; and what of it is not understood here, which must be said.

The file may be anybody's: nothing in it is trusted to be of its type, and its patterns are run only where they cannot
take long.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

Pattern = Literal["rank_pattern", "alpha_pattern"]
PATTERNS: dict[str, Pattern] = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
DEFAULTS = {"r": 8, "lora_alpha": 8}
"""PEFT's, where a configuration does not say."""
PLAIN_STARTS = (True, False, "gaussian", None)
"""Ways to begin an adapter that leave the base as it is. PiSSA, OLoRA, LoftQ and more change it too."""
UNDERSTOOD = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out"),
    *("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout"),
    *(
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
    ),
    *("runtime_config", "target_modules", "task_type", "trainable_token_indices", "use_rslora"),
}
"""Keys whose meaning is known, or that change nothing of what an adapter adds. Others count once they are set."""
LONGEST_PATTERN, MOST_REPEATS = 256, 4


def not_understood(config: Mapping[str, Any]) -> list[str]:
    """What of a configuration is not understood, so that what the adapter adds is not known."""
    found = [f"{key} = {brief(value)}" for key, value in sorted(config.items()) if key not in UNDERSTOOD and value]
    if config.get("use_dora"):
        found = [one for one in found if not one.startswith("use_dora")]
        found.append("use_dora = True (DoRA scales by the base's own columns)")
    start = config.get("init_lora_weights", True)
    if not any(start is plain or start == plain for plain in PLAIN_STARTS):
        found.append(f"init_lora_weights = {brief(start)} (it may change the base's own weights)")
    for key, pattern in PATTERNS.items():
        if not _is_number(config.get(key, DEFAULTS[key])):
            found.append(f"{key} = {brief(config.get(key))}")
        entries = config.get(pattern) or {}
        if not isinstance(entries, dict):
            found.append(f"{pattern} = {brief(entries)}")
            continue
        found += [f"{pattern} has {brief(name)}" for name in entries if not _is_safe(name)]
        found += [f"{pattern} says {brief(value)}" for value in entries.values() if not _is_number(value)]
    return found


def of_layer(config: Mapping[str, Any], key: Literal["r", "lora_alpha"], module: str) -> float:
    """The rank or the alpha of one layer: that of the first pattern that its name ends with, else that of all.

    For a configuration that is understood.
    """
    for pattern, value in (config.get(PATTERNS[key]) or {}).items():
        if _ends_with(pattern, module):
            return float(value)
    return float(config.get(key, DEFAULTS[key]))


def fits_nothing(config: Mapping[str, Any], modules: list[str]) -> list[str]:
    """Names in a configuration that fit none of these layers: what they were to say is not so."""
    targets = config.get("target_modules")
    found = [
        f"target_modules has {brief(target)}"
        for target in (targets if isinstance(targets, list) else [])
        if not any(f".{module}".endswith(f".{target}") for module in modules)
    ]
    for pattern in PATTERNS.values():
        entries = config.get(pattern)
        names = [name for name in entries if _is_safe(name)] if isinstance(entries, dict) else []
        found += [f"{pattern} has {brief(name)}" for name in names if not any(_ends_with(name, one) for one in modules)]
    return found


def _ends_with(pattern: str, module: str) -> bool:
    """PEFT's get_pattern_key, for names without the wrapper's prefix."""
    return re.match(rf"(.*\.)?({pattern})$", module.removeprefix("base_model.model.")) is not None


def _is_safe(pattern: str) -> bool:
    """Whether it is a regular expression that ends soon on any name: few repeats, none of a group, no look back."""
    if len(pattern) > LONGEST_PATTERN or len(re.findall(r"[*+{?]", pattern)) > MOST_REPEATS:
        return False
    if re.search(r"\)\s*[*+{?]|\(\?|\\[1-9]", pattern):
        return False
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e9


def brief(value: Any) -> str:
    """A value of the file as a line has room for it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
