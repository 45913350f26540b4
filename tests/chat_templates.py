"""Chat templates of the forms that real models have, and a tiny tokenizer that knows their special tokens."""

from __future__ import annotations

import string
from typing import Any

from tokenizers import AddedToken

import vocabularies
from builders import LEXICON

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As SmolLM2 and Qwen 2.5: a system of its own, a line end after each turn."""

GEMMA = (
    "{{ bos_token }}{% set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for message in (messages[1:] if system else messages) %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' + "
    "(system if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""As Gemma 3: a first token, the system in the first turn, turns in turn, spaces around a text taken away."""

LLAMA_3 = (
    "{% for message in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + message['role'] "
    "+ '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""As Llama 3: a first token, two line ends before a text, none after a turn."""

QWEN_3 = (
    "{% set last = namespace(user=0) %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{% set last.user = loop.index0 %}{% endif %}"
    "{% endfor %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "('<think>\n\n</think>\n\n' if message['role'] == 'assistant' and loop.index0 > last.user else '') + "
    "message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen 3: thoughts, here none, stand in the last turn alone, and go when a conversation goes on."""

BARE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
"""Of a model without special tokens: a line end ends a turn."""

ENDS = {"chatml": "<|im_end|>", "gemma": "<end_of_turn>", "llama-3": "<|eot_id|>", "qwen-3": "<|im_end|>"}
TEMPLATES = {"chatml": CHATML, "gemma": GEMMA, "llama-3": LLAMA_3, "qwen-3": QWEN_3}

SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)


def chatting(template: str | None) -> Any:
    """A byte-level tokenizer of the tests' words, which has a chat template, or none."""
    tokenizer = vocabularies.byte_level(
        400, texts=[*vocabularies.TEXTS, string.printable, LEXICON, *["\n  one\n  two"] * 3]
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(one, special=True, normalized=False) for one in SPECIAL]}
    )
    tokenizer.chat_template = template
    return tokenizer
