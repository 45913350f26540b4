"""One vocabulary for both models, which distillation needs."""

from __future__ import annotations

from stages.models.identity import PROBE_TEXTS
from stages.models.tuned import Outline
from stages.runtime.errors import UsageProblem
from stages.workspace.commands import Command


def check_one_vocabulary(slm: Outline, llm: Outline) -> int:
    """How many token ids the two models share. Raises UsageProblem unless their tokenizers agree on each of them.

    Rows of the larger vocabulary beyond that are padding (Qwen2.5 has 151,936 and 152,064) and are cut off.
    """
    shared = min(slm.vocabulary, llm.vocabulary)
    where = llm.tokenizer.name_or_path
    made = Command("shear", layers=...)
    mend = f"mutual distillation needs one tokenizer: take both models from one family, or make a small one by `{made}`"
    theirs = {index: token for token, index in llm.tokenizer.get_vocab().items()}
    ours = {index: token for token, index in slm.tokenizer.get_vocab().items()}
    for index in range(shared):
        if ours.get(index) != theirs.get(index):
            found = f"{ours.get(index)!r} for the SLM, {theirs.get(index)!r} for the LLM"
            raise UsageProblem(f"the tokenizers differ: token {index} is {found}", where=where, mend=mend)
    for text in PROBE_TEXTS:
        if slm.tokenizer.encode(text) != llm.tokenizer.encode(text):
            message = f"the tokenizers share a vocabulary but split text differently: {text!r}"
            raise UsageProblem(message, where=where, mend=mend)
    return shared
