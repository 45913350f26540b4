"""base_loading, base_files: a base is loaded as its files say or refused by name; what is trained is what is scored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as kinds
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from builders import Outcome, tiny_model
from stages.parts.base_files import weight_files
from stages.parts.base_loading import load_model, load_tokenizer
from stages.parts.errors import Problem, UsageProblem
from stages.parts.models import identify
from stages.parts.rows import Row, encode_row

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 135412096\n"
Weights = dict[str, torch.Tensor]


def changed(folder: Path, change: Callable[[Weights], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def configured(folder: Path, name: str = "config.json", **keys: Any) -> None:
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | keys))


def without_a_layer(folder: Path) -> None:
    changed(folder, lambda weights: [weights.pop(name) for name in list(weights) if "h.0.mlp" in name])


def without_embeddings(folder: Path) -> None:  # the head is tied to them
    changed(folder, lambda weights: weights.pop("transformer.wte.weight"))


def prefixed(folder: Path) -> None:
    changed(
        folder, lambda weights: [weights.update({f"_orig_mod.{name}": weights.pop(name)}) for name in list(weights)]
    )


def with_a_value_head(folder: Path) -> None:
    changed(folder, lambda weights: weights.update({"v_head.summary.weight": torch.ones(1, 16)}))


def with_one_nan(folder: Path) -> None:
    def change(weights: Weights) -> None:
        weights["transformer.h.0.mlp.c_fc.bias"][2] = torch.nan

    changed(folder, change)


def of_other_sizes(folder: Path) -> None:
    configured(folder, vocab_size=64)


def a_pointer(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(POINTER) and None


def a_pickled_pointer(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin").write_bytes(POINTER)


def cut_short(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def pickled_and_cut_short(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[: len(content) // 2])


def pickled_with_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weights": Path("x")}, folder / "pytorch_model.bin")


def with_parts_that_are_not_there(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')


def with_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def in_few_bits(folder: Path) -> None:
    configured(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def of_a_newer_tokenizer(folder: Path) -> None:
    configured(folder, "tokenizer.json", pre_tokenizer={"type": "SomethingNewer"})


def with_code_of_its_own(folder: Path) -> None:
    configured(folder, model_type="mine", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"})


def without_first_and_end_token(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def with_a_token_beyond(folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(folder)


def without_a_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def with_a_slow_tokenizer_that_cannot_be_read(folder: Path) -> None:
    without_a_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0bno pieces")


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        (without_a_layer, 4, "weights are missing: transformer.h.0.mlp"),
        (without_embeddings, 4, "weights are missing: "),
        (prefixed, 4, "weights are missing: "),
        (with_a_value_head, 4, "weights are unexpected: v_head.summary.weight"),
        (with_one_nan, 4, "hold NaN or infinity before any training: transformer.h.0.mlp.c_fc.bias"),
        (of_other_sizes, 4, "of another shape than config.json says: transformer.wte.weight is [29, 16], expected [64"),
        (a_pointer("model.safetensors"), 4, "model.safetensors is a Git LFS pointer"),
        (a_pointer("tokenizer.json"), 4, "tokenizer.json is a Git LFS pointer"),
        (a_pointer("config.json"), 4, "config.json is a Git LFS pointer"),
        (a_pickled_pointer, 4, "pytorch_model.bin is a Git LFS pointer"),
        (cut_short, 4, "model.safetensors is cut short or damaged"),
        (pickled_and_cut_short, 4, "weights cannot be read, cut short or damaged"),
        (pickled_with_code, 4, "weights cannot be read, cut short or damaged"),
        (with_parts_that_are_not_there, 4, "names model-00001-of-00002.safetensors, which is not there"),
        (with_an_adapter, 2, "holds an adapter too"),
        (in_few_bits, 2, "weights are stored in few bits (gptq); agreed is full precision"),
        (of_a_newer_tokenizer, 2, "tokenizer cannot be loaded"),
        (with_code_of_its_own, 2, "the SLM cannot be loaded"),
        (without_first_and_end_token, 2, "neither a first nor an end token"),
        (with_a_token_beyond, 2, "'<|im_start|>' is 29"),
        (without_a_tokenizer, 2, "tokenizer knows none of the words"),
        (with_a_slow_tokenizer_that_cannot_be_read, 2, "tokenizer cannot be loaded"),
    ],
)
def test_a_base_that_is_not_whole_is_refused_by_name_at_the_first_command(
    workspace_folder: Path,
    base_models: Path,
    tmp_path: Path,
    fedcollm: Callable[..., Outcome],
    damage: Callable[[Path], None],
    code: int,
    said: str,
) -> None:
    folder = shutil.copytree(base_models / "slm", tmp_path / "another slm")
    damage(folder)
    (workspace_folder / "machine.toml").write_text(f"[models]\nslm = {json.dumps(str(folder))}\n")
    outcome = fedcollm("broadcast", "--round", "1", "-w", workspace_folder)
    assert outcome.code == code, outcome.err
    assert said in outcome.err.replace("\n", " ")
    assert "mend" in outcome.err
    assert "Traceback" not in outcome.err
    assert not (workspace_folder / "exchange/round-0001/broadcast").exists()


# --- loaded right


@pytest.fixture
def slm(base_models: Path, tmp_path: Path) -> Path:
    """A copy of the SLM's folder, to change."""
    return shutil.copytree(base_models / "slm", tmp_path / "another slm")


def test_only_the_weights_that_are_loaded_count_in_the_fingerprint(slm: Path) -> None:
    tokenizer = load_tokenizer(slm, "the SLM")
    before = identify(slm, tokenizer)
    for name in ("consolidated.safetensors", "model-00001-of-00001.safetensors"):
        shutil.copyfile(slm / "model.safetensors", slm / name)
    (slm / "pytorch_model.bin").write_bytes(POINTER)
    (slm / "model.safetensors.index.json").write_text("{")
    assert weight_files(slm) == [slm / "model.safetensors"]
    assert identify(slm, tokenizer) == before
    assert load_model(slm, "the SLM").num_parameters() > 0


def test_masks_that_old_checkpoints_hold_are_no_weights(slm: Path) -> None:
    changed(slm, lambda weights: weights.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64)}))
    assert load_model(slm, "the SLM").num_parameters() > 0


def test_an_attention_kernel_that_is_not_here_is_not_needed(slm: Path) -> None:
    expected = load_model(slm, "the SLM")(torch.tensor([[2, 3, 4]])).logits
    configured(slm, _attn_implementation="flash_attention_2")
    found = load_model(slm, "the SLM")
    assert found.config._attn_implementation == "sdpa"
    assert torch.equal(found(torch.tensor([[2, 3, 4]])).logits, expected)


def test_pickled_weights_alone_are_loaded(slm: Path) -> None:
    expected = load_model(slm, "the SLM").state_dict()
    torch.save(load_file(slm / "model.safetensors"), slm / "pytorch_model.bin")
    (slm / "model.safetensors").unlink()
    found = load_model(slm, "the SLM").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- tokenizers

TEXTS = ["Question: Which of these is a mammal?\nAnswer: a whale", "the river runs to the sea", "yes no 0 1 2 3"] * 3
PAIRS = [("Question: Which of these?\nAnswer:", " whale"), ("Question: yes ", "no"), ("the river\n", "runs to the sea")]


def trained(folder: Path, *, first: bool, end: bool, dummy_space: bool, **special: str) -> Path:
    """A tokenizer that puts these tokens around every text, with or without a space before it."""
    made = Tokenizer(kinds.BPE())
    if dummy_space:  # as converted from sentencepiece: a space first, and spaces as letters
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # type: ignore[assignment]
        alphabet = sorted(set("▁" + "".join(TEXTS)))
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    single = ("<s> " if first else "") + "$A" + (" </s>" if end else "")
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return folder


BOTH = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("dummy_space", [False, True], ids=["", "dummy space"])
@pytest.mark.parametrize(
    ("first", "end", "special"),
    [
        (False, False, BOTH),
        (True, False, BOTH),
        (False, True, BOTH),
        (True, True, BOTH),
        (False, False, {"eos_token": "</s>"}),
        (False, False, {"bos_token": "<s>"}),
    ],
    ids=["none added", "first", "end", "first and end", "end token alone", "first token alone"],
)
def test_the_first_answer_token_is_trained_and_what_is_trained_is_scored(
    tmp_path: Path, first: bool, end: bool, dummy_space: bool, special: dict[str, str]
) -> None:
    from stages.parts.scoring import _Reporting

    folder = trained(tmp_path, first=first, end=end, dummy_space=dummy_space, **special)
    tokenizer: Any = load_tokenizer(folder, "the SLM")
    harness = _Reporting(pretrained=tiny_model(vocabulary=len(tokenizer), width=4), tokenizer=tokenizer)
    plain: Any = super(_Reporting, harness)
    space = "▁" if dummy_space else ""
    for prompt, completion in PAIRS:
        found = encode_row(Row(prompt, completion), tokenizer)
        answer = found.input_ids[found.prompt_tokens :]
        # The reference: the text's own tokens, without any that are added, split where the prompt's letters end.
        own = tokenizer.encode(prompt + completion, add_special_tokens=False)
        assert found.input_ids == [0] * first + own
        text = "".join(tokenizer.convert_ids_to_tokens(answer)).replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n")
        assert text == (prompt + completion)[len(prompt.rstrip()) :]
        assert 1 not in answer
        assert harness._encode_pair(prompt, completion) == (found.input_ids[: found.prompt_tokens], answer)
        assert plain._encode_pair(prompt, completion) == (found.input_ids[: found.prompt_tokens], answer)
        assert tokenizer.convert_ids_to_tokens(own)[0].startswith(space)


def test_a_tokenizer_that_can_only_be_refused_says_what_it_does(tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="neither a first nor an end token") as caught:
        load_tokenizer(trained(tmp_path, first=False, end=False, dummy_space=False), "the LLM")
    assert isinstance(caught.value, Problem)
    assert "eos_token" in str(caught.value.mend)
