"""Tiny tokenizers of every kind that real models have, built on the spot, and vocabularies given token by token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stages.artefacts.vocabulary_files import Kind, Vocabulary

TEXTS = [
    "Question: Which of these is a mammal?\nAnswer: a whale",
    "the cat sat on the mat, the other cat sat on another mat",
    "In 1997 there were 1,234 naïve cafés — “quotes”, 数学, 🙂",
    "  two  spaces\tand a tab\r\n\r\nand lines",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
MARK = "▁"


def fast(tokenizer: Tokenizer, **tokens: str) -> Any:
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | tokens
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def byte_level(
    size: int = 320,
    *,
    llama_3: bool = False,
    prefix: bool = False,
    end: str = "<|end|>",
    texts: Sequence[str] = TEXTS,
) -> Any:
    """As GPT-2's, or as Llama 3's, which splits by a pattern of its own; one special token for everything."""
    tokenizer = Tokenizer(models.BPE())
    own = [
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?[^\s\p{N}]+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    plain = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(own) if llama_3 else plain
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return fast(tokenizer, unk_token=end, bos_token=end, eos_token=end)


def sentence_piece(
    size: int = 200, *, dummy: bool = True, first: bool = False, texts: Sequence[str] = TEXTS[:2]
) -> Any:
    """As Llama 2's, with a space before the first word, or as Gemma's, without; with all bytes to fall back on.

    first: whether it begins each text with <s>.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    spaces = normalizers.Replace(" ", MARK)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), spaces]) if dummy else spaces
    tokenizer.pre_tokenizer = pre_tokenizers.Split(MARK, "merged_with_next")  # no token has two words, as in theirs
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    told = json.loads(tokenizer.to_str())
    vocabulary = told["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    told["model"]["byte_fallback"] = True
    parts = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    found = Tokenizer.from_str(json.dumps(told))
    found.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if dummy else [])])
    if first:
        from tokenizers.processors import TemplateProcessing

        found.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast(found)


def metaspace() -> Any:
    """As T5's and XLM-R's, a unigram model; what it does not know is <unk>."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return fast(tokenizer)


def characters(texts: Sequence[str] = TEXTS) -> Any:
    """A token for each character of some texts; any other is <unk>."""
    letters = sorted(set("".join(texts)))
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    return fast(Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>")))


def single_bytes() -> Any:
    """A token for each byte and no more."""
    return byte_level(257)


def word_piece() -> Any:
    """As BERT's: its pieces do not say where spaces are."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return fast(tokenizer)


def words() -> Any:
    """Words alone, without the spaces between them."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *sorted(set(" ".join(TEXTS).split()))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast(tokenizer)


def in_lower_case() -> Any:
    """A tokenizer that changes the text before it reads it."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def vocabulary(tokens: Sequence[bytes | tuple[Kind, bytes]], **roles: int) -> Vocabulary:
    """Given token by token: text, unless a kind stands beside."""
    return Vocabulary.of([one if isinstance(one, tuple) else (Kind.TEXT, one) for one in tokens], roles, "0" * 64)


def saved(folder: Path, tokenizer: Any, *, rows: int | None = None) -> Path:
    """The folder of a base without weights: its configuration and its tokenizer."""
    from transformers import GPT2Config

    tokenizer.save_pretrained(folder)
    GPT2Config(vocab_size=rows or len(tokenizer), n_positions=512, n_embd=8, n_layer=1, n_head=1).save_pretrained(
        folder
    )
    return folder
