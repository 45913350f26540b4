"""base_loading, base_files: a base is loaded as its files say or refused by name; what is trained is what is scored."""

from __future__ import annotations

import importlib.util
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

from builders import Outcome, edit, tiny_model
from stages.bases.base_files import check
from stages.data.examples import encode_row
from stages.data.rows import Row
from stages.models.base_loading import check_unread, load_model, load_tokenizer
from stages.models.identity import identify
from stages.models.loading import Models
from stages.planning.missing import missing
from stages.planning.prefetch import prefetch
from stages.runtime.errors import Damaged, Problem, UsageProblem
from stages.workspace.paths import Workspace

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


def stored(**how: Any) -> Callable[[Path], None]:
    return lambda folder: configured(folder, quantization_config=how)


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


def with_a_tokenizer_to_convert(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        without_a_tokenizer(folder)
        (folder / name).write_bytes(b"\x0a\x0bpieces")

    return damage


def with_words_but_no_merges(folder: Path) -> None:
    without_a_tokenizer(folder)
    (folder / "vocab.json").write_text('{"whale": 0}')


def of_a_tokenizer_with_code(folder: Path) -> None:
    configured(folder, "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]})


def of_another_class(folder: Path) -> None:  # which splits what it calls words by letters
    configured(folder, "config.json", model_type="llama", num_attention_heads=2)
    configured(folder, "tokenizer_config.json", tokenizer_class="GemmaTokenizer")


def told(name: str, **keys: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).touch()
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text() or "{}") | keys))

    return damage


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def without_settings_of_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()


def stored_in_few_bits_without_a_word(folder: Path) -> None:
    changed(
        folder,
        lambda weights: weights.update(
            {name: one.to(torch.float8_e4m3fn) for name, one in weights.items() if ".mlp." in name}
        ),
    )


def as_another_kind_of_model(folder: Path) -> None:
    configured(folder, model_type="t5")


def of_one_precision_alone(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")


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
        *(
            (stored(quant_method=method), 2, f"weights are stored in few bits ({method}); agreed is full precision")
            for method in ("gptq", "awq", "fp8", "mxfp4", "compressed-tensors")
        ),
        (stored(load_in_4bit=True), 2, "weights are stored in 4bit (bitsandbytes); agreed is full precision"),
        (stored(quant_method="bitsandbytes", load_in_8bit=True), 2, "weights are stored in 8bit (bitsandbytes)"),
        (stored(), 2, "weights are stored in few bits (bitsandbytes)"),
        (stored_in_few_bits_without_a_word, 2, "weights are stored in F8_E4M3 (transformer.h.0.mlp."),
        (of_one_precision_alone, 2, "no index; model.fp16.safetensors is not read"),
        (of_a_newer_tokenizer, 2, "tokenizer cannot be loaded"),
        (with_code_of_its_own, 2, "the SLM cannot be loaded: it needs code of its own, which is never run"),
        (told("config.json", model_type="qwen99"), 2, "the SLM cannot be loaded: "),
        (as_another_kind_of_model, 2, "the SLM cannot be loaded: Unrecognized configuration class"),
        (told("config.json", n_embd="big"), 2, "the SLM cannot be loaded: Validation error for field 'n_embd': "),
        (told("config.json", n_head=3), 2, "the SLM cannot be loaded: `embed_dim` must be divisible by num_heads"),
        (told("config.json", dtype="float3"), 2, "the SLM cannot be loaded: "),
        (written("config.json", '{"model_type": "gp'), 2, "config.json is not JSON"),
        (written("config.json", "[]"), 2, "config.json is no table of settings but a list"),
        (without_first_and_end_token, 2, "neither a first nor an end token"),
        (with_a_token_beyond, 2, "'<|im_start|>' is 29"),
        (told("special_tokens_map.json", eos_token="<gone>"), 2, "'<gone>' as its end token, which none of its files"),
        (told("tokenizer_config.json", bos_token="<gone>"), 2, "'<gone>' as its first token, which none of its files"),
        (without_settings_of_the_tokenizer, 2, "tokenizer is loaded as a GPT2Tokenizer, which reads"),
        (told("added_tokens.json", **{"<new>": 29}), 2, "'<new>' is 29"),
        (written("added_tokens.json", "{"), 2, "added_tokens.json is not JSON"),
        (written("special_tokens_map.json", "[]"), 2, "special_tokens_map.json is no table of settings but a list"),
        (written("tokenizer_config.json", '{"a'), 2, "tokenizer_config.json is not JSON"),
        (of_a_tokenizer_with_code, 2, "tokenizer needs code of its own (auto_map in tokenizer_config.json)"),
        (of_another_class, 2, "loaded as a GemmaTokenizer, which reads"),
        (without_a_tokenizer, 2, "the SLM has no tokenizer.json "),
        (with_words_but_no_merges, 2, "the SLM has no tokenizer.json, only vocab.json"),
        *(
            (with_a_tokenizer_to_convert(name), 2, f"the SLM has no tokenizer.json, only {name}")
            for name in ("tokenizer.model", "spiece.model", "qwen.tiktoken", "tekken.json", "vocab.txt")
        ),
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
    needs_weights = damage in (with_one_nan, with_parts_that_are_not_there, of_one_precision_alone)
    for command in ([] if needs_weights else ["plan", "comm-cost", "prefetch"]) + ["broadcast --round 1"]:
        outcome = fedcollm(*command.split(), "-w", workspace_folder)
        assert outcome.code == code, f"{command}: {outcome.err}"
        assert said in outcome.err.replace("\n", " "), command
        assert "mend" in outcome.err, command
        assert "Traceback" not in outcome.err, command
    assert not (workspace_folder / "exchange/round-0001/broadcast").exists()


def test_weights_that_are_not_all_here_yet_are_missing(slm: Path, workspace_folder: Path) -> None:
    with_parts_that_are_not_there(slm)
    (workspace_folder / "machine.toml").write_text(f"[models]\nslm = {json.dumps(str(slm))}\n")
    found = missing(Workspace(workspace_folder), roles=["slm"])
    assert "model.safetensors.index.json names model-00001-of-00002.safetensors, which is not there" in found[0].what
    with pytest.raises(Damaged, match="which is not there"):
        prefetch(Workspace(workspace_folder), model="slm")


# --- loaded right


@pytest.fixture
def slm(base_models: Path, tmp_path: Path) -> Path:
    """A copy of the SLM's folder, to change."""
    return shutil.copytree(base_models / "slm", tmp_path / "another slm")


COPIES = (
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "model-00001-of-00001.safetensors",
    "original/consolidated.00.pth",
    "onnx/model.onnx",
    "model.gguf",
    "tf_model.h5",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Of a folder with weights as safetensors, what transformers passes over."""


def in_parts(folder: Path) -> Path:
    """The same weights in two files and an index; the first."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, where = sorted(weights), {}
    for i, some in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: weights[name] for name in some}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder / "model-00001-of-00002.safetensors"


@pytest.mark.parametrize("kind", ["one file", "in parts"])
def test_only_the_weights_that_are_loaded_count_in_the_fingerprint(slm: Path, kind: str) -> None:
    tokenizer, expected = load_tokenizer(slm, "the SLM"), load_model(slm, "the SLM").state_dict()
    before = identify(slm, tokenizer)
    loaded = slm / "model.safetensors" if kind == "one file" else in_parts(slm)
    copies = [*COPIES, *(["model.safetensors.index.json"] if kind == "one file" else [])]
    for name in copies:
        (slm / name).parent.mkdir(exist_ok=True)
        (slm / name).write_bytes(POINTER)
    check(slm, "slm", None)
    assert identify(slm, tokenizer) == before
    found = load_model(slm, "the SLM").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    weights = load_file(loaded)
    name = next(name for name in sorted(weights) if weights[name].any())
    save_file(weights | {name: weights[name] + 1}, loaded, metadata={"format": "pt"})
    assert identify(slm, tokenizer).weights_sha256 != before.weights_sha256
    assert not torch.equal(load_model(slm, "the SLM").state_dict()[name], expected[name])


def test_of_two_copies_that_differ_the_one_that_is_loaded_is_the_one_that_counts(slm: Path) -> None:
    """One file goes before an index, and both before what is pickled, as transformers looks for them."""
    tokenizer, weights = load_tokenizer(slm, "the SLM"), load_file(slm / "model.safetensors")
    name = "transformer.wpe.weight"
    in_parts(slm)
    torch.save(weights | {name: weights[name] * 0}, slm / "pytorch_model.bin")
    parts = identify(slm, tokenizer)
    assert torch.equal(load_model(slm, "the SLM").state_dict()[name], weights[name])
    save_file(weights | {name: weights[name] + 1}, slm / "model.safetensors", metadata={"format": "pt"})
    assert identify(slm, tokenizer) != parts
    assert torch.equal(load_model(slm, "the SLM").state_dict()[name], weights[name] + 1)
    for path in slm.glob("model*.safetensors*"):
        path.unlink()
    pickled = identify(slm, tokenizer)
    assert not load_model(slm, "the SLM").state_dict()[name].any()
    torch.save(weights, slm / "pytorch_model.bin")
    assert identify(slm, tokenizer) != pickled


def test_words_and_merges_are_a_tokenizer_without_a_tokenizer_json(slm: Path) -> None:
    alone = trained(slm, first=False, end=False, dummy_space=False, **BOTH)
    expected = load_tokenizer(alone, "the SLM").encode(TEXTS[0])
    Tokenizer.from_file(str(alone / "tokenizer.json")).model.save(str(alone))
    (alone / "tokenizer.json").unlink()
    told("tokenizer_config.json", tokenizer_class="GPT2Tokenizer")(alone)
    assert load_tokenizer(alone, "the SLM").encode(TEXTS[0]) == expected


def test_masks_that_old_checkpoints_hold_are_no_weights(slm: Path) -> None:
    changed(slm, lambda weights: weights.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64)}))
    assert load_model(slm, "the SLM").num_parameters() > 0


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn", "flex"])
def test_an_attention_kernel_that_is_not_here_is_not_needed(slm: Path, kernel: str) -> None:
    expected = load_model(slm, "the SLM")(torch.tensor([[2, 3, 4]])).logits
    configured(slm, _attn_implementation=kernel)
    check_unread(slm, "slm", None)
    found = load_model(slm, "the SLM")
    assert found.config._attn_implementation == "sdpa"
    assert torch.equal(found(torch.tensor([[2, 3, 4]])).logits, expected)


def test_pickled_weights_alone_are_loaded(slm: Path) -> None:
    expected = load_model(slm, "the SLM").state_dict()
    torch.save(load_file(slm / "model.safetensors"), slm / "pytorch_model.bin")
    (slm / "model.safetensors").unlink()
    found = load_model(slm, "the SLM").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- no numbers


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_nan_is_found_in_a_base_that_is_then_held_in_few_bits(slm: Path, workspace_folder: Path, bits: str) -> None:
    with_one_nan(slm)
    (workspace_folder / "machine.toml").write_text(f'device = "cpu"\n[models]\nslm = {json.dumps(str(slm))}\n')
    edit(workspace_folder / "fedcollm.toml", 'model = "models/slm"', f'model = "models/slm"\nquantization = "{bits}"')
    with pytest.raises(Damaged, match=r"NaN or infinity before any training: transformer\.h\.0\.mlp\.c_fc\.bias"):
        Models(Workspace(workspace_folder)).get("slm")


def test_a_base_that_says_nan_though_its_weights_are_numbers_gets_no_score(
    slm: Path, workspace_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    changed(slm, lambda weights: weights.update({name: 1e30 * one for name, one in weights.items() if ".wte." in name}))
    (workspace_folder / "machine.toml").write_text(f"[models]\nslm = {json.dumps(str(slm))}\n")
    outcome = fedcollm("evaluate", "--zero-shot", "-w", workspace_folder)
    assert outcome.code == 6, outcome.err
    assert "the model's logits are NaN or infinite" in outcome.err
    assert "the learning rate is not it" in outcome.err
    assert not list((workspace_folder / "results").rglob("*.json"))


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
    from stages.evaluation.harness import Harness

    folder = trained(tmp_path, first=first, end=end, dummy_space=dummy_space, **special)
    tokenizer: Any = load_tokenizer(folder, "the SLM")
    harness = Harness(pretrained=tiny_model(vocabulary=len(tokenizer), width=4), tokenizer=tokenizer)
    plain: Any = super(Harness, harness)
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


def test_scoring_encodes_a_text_once_however_many_answers_share_it(
    base_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.evaluation.harness import Harness

    tokenizer: Any = load_tokenizer(base_models / "slm", "the SLM")
    encode, encoded = tokenizer.encode, list[str]()
    monkeypatch.setattr(tokenizer, "encode", lambda text, **settings: encoded.append(text) or encode(text, **settings))
    harness = Harness(pretrained=tiny_model(vocabulary=len(tokenizer), width=4), tokenizer=tokenizer)
    pairs = [("the sky is", answer) for answer in (" blue", " red", " green")] * 2
    encoded.clear()
    found = [harness._encode_pair(*pair) for pair in pairs]
    assert sorted(encoded) == ["the sky is", "the sky is blue", "the sky is green", "the sky is red"]
    assert found[:3] == found[3:]
    for pair, (before, after) in zip(pairs, found, strict=True):
        assert before == encode("the sky is")
        assert before + after == encode("".join(pair))
