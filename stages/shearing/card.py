"""The card of a sheared model, and what it inherits: licence, language and parents of the model it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from huggingface_hub import metadata_load

from stages.export.cards import template
from stages.workspace.names import MODEL_CARD

if TYPE_CHECKING:
    from stages.shearing.shear import Shear

TEMPLATE = Path(__file__).with_name("card.md.j2")
LICENCES = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*", "COPYING*")
"""Files that say on what terms a model may be used: they hold for what is made from it."""
INHERITED = ("license", "license_name", "license_link", "language")


class Inherited(NamedTuple):
    """From the front matter of the whole model's card: what stays true of its parts, and what it was made from."""

    said: dict[str, list[str]]
    parents: list[str]


def inherited(base: Path) -> Inherited:
    """What the card in a base's folder says; nothing where there is none, or none that can be read."""
    try:
        found: Any = metadata_load(base / MODEL_CARD) if (base / MODEL_CARD).is_file() else None
    except Exception:  # YAML's errors, of someone else's file
        found = None
    said = found if isinstance(found, dict) else {}
    kept = {key: _texts(said.get(key)) for key in INHERITED}
    return Inherited({key: texts for key, texts in kept.items() if texts}, _texts(said.get("base_model")))


def _texts(value: Any) -> list[str]:
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]


def in_digits(perplexity: float) -> str:
    """As people read it: four digits, and a large one whole, such as 24,587 and not 2.459e+04."""
    if perplexity < 9999.5:
        return f"{perplexity:.4g}"
    return f"{perplexity:,.0f}" if perplexity < 1e12 else f"{perplexity:.3g}"


def card(made: Shear, found: Inherited, name: str) -> str:
    """The card as Markdown with front matter. name: what the whole model is called."""
    perplexities = {which: in_digits(made["perplexity"][which]) for which in made["perplexity"]}  # type: ignore[literal-required]
    return template(TEMPLATE).render(
        made=made, perplexities=perplexities, said=found.said, parents=found.parents, name=name
    )
