"""What a party is told of the folder that was made for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.runtime import texts

if TYPE_CHECKING:
    from stages.federation.joining import Joined

ALOUD = "warning: have the organiser read out this fingerprint, by phone, before you use the folder"


def joined(made: Joined) -> str:
    """The folder, what was agreed, the fingerprint, what has not come, and what to do now."""
    width = max(len(name) for name, _ in made.agreed)
    said = [str(made.path), *(f"  {name:{width}}  {value}" for name, value in made.agreed)]
    if made.fingerprint:
        said.append(
            f"  {'fingerprint':{width}}  {made.fingerprint}{', as it was read out' if made.is_compared else ''}"
        )
        said += [] if made.is_compared else [ALOUD]
    said += [f"missing: {one.what}; {one.mend}" for one in made.missing]
    said.append(f"next: put your rows into {' and '.join(made.rows)}; then, in that folder: {made.next_command}")
    return texts.lines(said)
