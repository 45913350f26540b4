"""One vocabulary for both models, which distillation needs."""

from __future__ import annotations

from stages.bases.one_tokenizer import two_tokenizers, unlike
from stages.models.identity import PROBE_TEXTS
from stages.models.tuned import Outline

FOLDED = "cafe\u0301 \ufb01ne, 2\u00b2 + \u00bd = 4\u2026 \uff21\uff22\uff23, \u00c5 and \u0130STANBUL, \u2167"
"""What normalisers read otherwise, each in its way: marks on their own, ligatures, powers, wide and large letters.

It is no probe text: those are part of a tokenizer's identity.
"""


def check_one_vocabulary(slm: Outline, llm: Outline) -> int:
    """How many token ids the two models share. Raises UsageProblem unless their tokenizers agree on each of them.

    Rows of the larger vocabulary beyond that are padding (Qwen2.5 has 151,936 and 152,064) and are cut off.
    """
    shared = min(slm.vocabulary, llm.vocabulary)
    where = llm.tokenizer.name_or_path
    theirs = {index: token for token, index in llm.tokenizer.get_vocab().items()}
    ours = {index: token for token, index in slm.tokenizer.get_vocab().items()}
    for index in range(shared):
        if ours.get(index) != theirs.get(index):
            raise two_tokenizers(index, ours.get(index), theirs.get(index), where=where)
    for text in (*PROBE_TEXTS, FOLDED):
        if slm.tokenizer.encode(text) != llm.tokenizer.encode(text):
            raise unlike(f"the tokenizers share a vocabulary but split text differently: {text!r}", where)
    return shared
