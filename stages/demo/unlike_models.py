"""The demo's models of unlike families: three SLMs and an LLM, of three architectures and with four tokenizers.

slm-1 reads characters, slm-2 a byte-level BPE of 400 tokens, slm-3 words with a mark for the space as SentencePiece
writes them, the LLM a byte-level BPE of whole words. So one word is up to ten tokens of one and a single token of
another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stages.demo.tiny_models import END, Shape, train_tokenizer
from stages.demo.world import lexicon

UNKNOWN = "<unk>"
SPACE = "▁"
WORDS_OF_SLM_3 = 600
TOKENS_OF_SLM_2 = 400

SHAPES = {
    # Characters of the longest question and answer: 72, and the end.
    "slm-1": Shape(width=96, layers=2, heads=4, passes=20, learning_rate=4e-3, context=80, architecture="llama"),
    "slm-2": Shape(width=96, layers=2, heads=4, passes=20, learning_rate=5e-3, context=64, architecture="llama"),
    "slm-3": Shape(width=96, layers=2, heads=4, passes=20, learning_rate=5e-3, context=32, architecture="opt"),
    "llm": Shape(width=160, layers=2, heads=4, passes=13, learning_rate=4e-3, context=32),
}


def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """One for each model, all trained on every word of every world."""
    found = {
        "slm-1": _characters(),
        "slm-2": train_tokenizer(lexicon(), size=TOKENS_OF_SLM_2),
        "slm-3": _sentence_piece(lexicon(), WORDS_OF_SLM_3),
        "llm": train_tokenizer(lexicon()),
    }
    for name, tokenizer in found.items():
        tokenizer.model_max_length = SHAPES[name].context
    return found


def _characters() -> PreTrainedTokenizerFast:
    """A token for each printable character of ASCII and the line end; any other is unknown."""
    letters = ["\n", *map(chr, range(ord(" "), ord("~") + 1))]
    vocabulary = {token: index for index, token in enumerate([UNKNOWN, END, *letters])}
    return _fast(Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN)))


def _sentence_piece(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """As Llama 2's: a mark for each space, one more before the first word, and bytes for what is no token."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[UNKNOWN, END], show_progress=False)
    tokenizer.train_from_iterator([text.strip() for text in texts], trainer)
    written = json.loads(tokenizer.to_str())  # only there can merges be read, and bytes be added that are not special
    vocabulary = written["model"]["vocab"]
    vocabulary.update({f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)})
    written["model"]["byte_fallback"] = True
    whole = Tokenizer.from_str(json.dumps(written))
    whole.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(whole)


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, unk_token=UNKNOWN, bos_token=END, eos_token=END, pad_token=END
    )
