"""Which of the two forms a batch takes: packed or padded, whichever costs less."""

from __future__ import annotations

from collections.abc import Sequence

from stages.data.rows import Example
from stages.models.packing import Batch, packed, padded


def collate(examples: Sequence[Example], *, may_pack: bool, hidden_size: int) -> Batch:
    """The cheaper of the two layouts.

    Work grows with tokens and, for attention, with pairs of positions; 6 x hidden_size is where the two weigh alike in
    a transformer layer (12 hidden_size^2 against 2 hidden_size multiplications). Packing saves padding but pays for
    pairs across examples, which are computed and masked.
    """
    lengths = [len(example.input_ids) for example in examples]
    tokens, longest = sum(lengths), max(lengths)
    packed_work = tokens * (tokens + 6 * hidden_size)
    padded_work = len(lengths) * longest * (longest + 6 * hidden_size)
    return packed(examples) if may_pack and packed_work <= padded_work else padded(examples)
