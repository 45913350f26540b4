"""shear: a folder that loads as any base, from the LLM's own weights; the same again, stopped, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import vocabularies
from builders import LEXICON, Family, contents, drafts, edit, make_workspace, rows, tiny_model
from stages.runtime.errors import BadNumbers, Damaged, NotReady, Problem, Refused, UsageProblem
from stages.runtime.events import Event
from stages.shearing import blocks
from stages.shearing.heal import Heal
from stages.shearing.neurons import mlps_of
from stages.shearing.shear import Shear, shear
from stages.shearing.texts import as_rows, read_auxiliary
from stages.workspace.paths import Workspace

CARD = """---
license: other
license_name: tiny-licence
license_link: LICENSE
language: [en, fr]
base_model: someone/tiniest
---
# Tiny
"""


@pytest.fixture
def study(tmp_path: Path, base_models: Path) -> Path:
    """A workspace whose models are its own."""
    folder = make_workspace(tmp_path / "study", base_models)
    (folder / "models").unlink()
    shutil.copytree(base_models, folder / "models")
    shutil.rmtree(folder / "models/slm")
    return folder


def put(study: Path, family: Family, *, layers: int = 4, dtype: torch.dtype = torch.float32) -> Any:
    """Give the workspace another LLM, and return it."""
    folder = study / "models/llm"
    if family == "qwen2":  # whose tokenizers are read as byte-level BPE, whatever their file says
        texts = [*vocabularies.TEXTS, LEXICON, *(row["prompt"] + row["completion"] for row in rows(12))]
        vocabularies.byte_level(500, texts=texts).save_pretrained(folder)
        tiny_model(family).config.save_pretrained(folder)
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    model = tiny_model(family, layers=layers, vocabulary=vocabulary).to(dtype)
    model.save_pretrained(folder)
    return model


def sheared(study: Path, **words: Any) -> Shear:
    return shear(Workspace(study), **{"layers": 2, "length": 16, **words})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# --- what is written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", get_args(Family))
def test_the_folder_holds_the_kept_blocks_bit_for_bit(family: Family, dtype: torch.dtype, study: Path) -> None:
    whole = put(study, family, dtype=dtype)
    made = sheared(study)
    folder = study / "models/slm"
    assert made["kept"] == sorted(sorted(range(4), key=lambda block: -made["influence"][block])[:2])
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not (info["missing_keys"])
    assert not (info["unexpected_keys"])
    assert not (info["mismatched_keys"])
    assert model.dtype == dtype
    assert model.config.num_hidden_layers == 2
    ours, theirs = weights(folder), weights(study / "models/llm")
    assert sum(tensor.numel() for tensor in ours.values()) < sum(tensor.numel() for tensor in theirs.values())
    for name, tensor in ours.items():
        parts = name.split(".")
        place = next((at for at, part in enumerate(parts) if part.isdigit()), None)
        if place is not None:
            parts[place] = str(made["kept"][int(parts[place])])
        assert torch.equal(tensor, theirs[".".join(parts)]), name
    assert ("lm_head.weight" in ours) == ("lm_head.weight" in theirs)
    before, after = (json.loads((place / "config.json").read_text()) for place in (study / "models/llm", folder))
    differing = {key for key in before | after if before.get(key) != after.get(key)}
    assert differing <= {"num_hidden_layers", "n_layer", "layer_types"}
    assert whole.config.num_hidden_layers == 4


@pytest.mark.parametrize("family", get_args(Family))
def test_narrower_layers_are_healed_and_load_as_any_base(family: Family, study: Path) -> None:
    put(study, family)
    made = sheared(study, layers=4, neurons=7, heal=Heal(steps=2), on_auxiliary=True)
    assert (made["layers"], made["neurons"], made["kept"]) == (4, 7, [0, 1, 2, 3])
    model, info = AutoModelForCausalLM.from_pretrained(study / "models/slm", output_loading_info=True)
    assert not (info["missing_keys"])
    assert not (info["unexpected_keys"])
    assert not (info["mismatched_keys"])
    assert {mlp.width for mlp in mlps_of(model)} == {7}
    assert "7 neurons" in (study / "models/slm/README.md").read_text()
    assert sheared(study, layers=4, neurons=7, heal=Heal(steps=2), on_auxiliary=True) == made
    with pytest.raises(Refused, match="neurons"):
        sheared(study, layers=4, neurons=8, heal=Heal(steps=2), on_auxiliary=True)


def test_tokenizer_generation_settings_and_licence_are_the_llms(study: Path) -> None:
    llm, folder = study / "models/llm", study / "models/slm"
    (llm / "generation_config.json").write_text('{"eos_token_id": [1, 2], "do_sample": true, "temperature": 0.6}')
    (llm / "LICENSE").write_text("Do what you like.")
    (llm / "README.md").write_text(CARD)
    edit(study / "fedcollm.toml", '"models/llm"', f'"{llm}"')
    sheared(study, layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (folder / name).read_bytes() == (llm / name).read_bytes()
    card = ModelCard.load(folder / "README.md")
    said = card.data.to_dict()
    assert {key: said[key] for key in ("license", "license_name", "license_link", "language")} == {
        "license": "other",
        "license_name": "tiny-licence",
        "license_link": "LICENSE",
        "language": ["en", "fr"],
    }
    assert "itself made from someone/tiniest" in card.text
    assert "# llm, sheared to 1 of 2 layers" in card.text
    assert str(study) not in card.content


def test_a_card_that_cannot_be_read_takes_nothing_over(study: Path) -> None:
    (study / "models/llm/README.md").write_text("---\nlicense: [\n---\n")
    sheared(study, layers=1)
    assert "license" not in ModelCard.load(study / "models/slm/README.md").data.to_dict()


def test_perplexities_are_those_of_the_text_that_was_kept_out(study: Path) -> None:
    put(study, "llama")
    made = sheared(study, heal=Heal(steps=8, learning_rate=1e-2), on_auxiliary=True)
    tokenizer = AutoTokenizer.from_pretrained(study / "models/llm")
    held = as_rows(read_auxiliary(Workspace(study).auxiliary_data), tokenizer, 16).kept_out
    assert made["measured_on"] == {"rows": len(held), "length": 16}
    for name, folder in {"whole": "models/llm", "healed": "models/slm"}.items():
        model: Any = AutoModelForCausalLM.from_pretrained(study / folder)
        with torch.no_grad():
            expected = torch.stack([model(torch.tensor([row]), labels=torch.tensor([row])).loss for row in held])
        assert made["perplexity"][name] == pytest.approx(float(expected.mean().exp()), rel=1e-4)  # type: ignore[literal-required]
        assert f"{made['perplexity'][name]:.4g}" in (study / "models/slm/README.md").read_text()  # type: ignore[literal-required]


@pytest.mark.parametrize("family", get_args(Family))
def test_a_healed_model_says_more_of_what_the_whole_one_says(family: Family, study: Path) -> None:
    whole = put(study, family)
    sheared(study, folder=study / "cut")
    sheared(study, folder=study / "healed", on_auxiliary=True, heal=Heal(steps=30, learning_rate=3e-3))
    tokenizer = AutoTokenizer.from_pretrained(study / "models/llm")
    ids = torch.tensor(as_rows(read_auxiliary(Workspace(study).auxiliary_data), tokenizer, 16).kept_out)
    apart = {}
    for name in ("cut", "healed"):
        model: Any = AutoModelForCausalLM.from_pretrained(study / name)
        with torch.no_grad():
            both = [F.log_softmax(one(ids).logits, dim=-1) for one in (model, whole)]
        apart[name] = float(F.kl_div(*both, reduction="batchmean", log_target=True))
    assert apart["healed"] < 0.9 * apart["cut"]
    healed, cut = weights(study / "healed"), weights(study / "cut")
    assert healed.keys() == cut.keys()
    assert not any(torch.equal(healed[name], cut[name]) for name in cut if name.endswith("weight"))


# --- again


def test_the_same_twice_gives_the_same_bytes_and_again_is_already_done(study: Path) -> None:
    heal = Heal(steps=6)
    sheared(study, layers=1, folder=study / "first", on_auxiliary=True, heal=heal)
    made = sheared(study, layers=1, folder=study / "second", on_auxiliary=True, heal=heal)
    assert contents(study / "first") == contents(study / "second")
    told: list[Event] = []
    again = sheared(study, layers=1, folder=study / "first", on_auxiliary=True, heal=heal, report=told.append)
    assert again == made
    assert told[-1].text == "already done"


def test_a_healing_that_was_stopped_goes_on_to_the_same_bytes(study: Path) -> None:
    heal = Heal(steps=6)
    sheared(study, layers=1, folder=study / "at-once", on_auxiliary=True, heal=heal)
    (study / "machine.toml").write_text("checkpoint_steps = 2\n")
    steps: list[int] = []

    def stop(event: Event) -> None:
        if event.values:
            steps.append(event.step)
            if event.step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sheared(study, layers=1, on_auxiliary=True, heal=heal, report=stop)
    assert not (study / "models/slm").exists()
    assert drafts(study) == []
    again: list[int] = []
    sheared(
        study, layers=1, on_auxiliary=True, heal=heal, report=lambda one: again.append(one.step) if one.values else None
    )
    assert (steps, again) == ([1, 2, 3, 4, 5], [5, 6])
    assert contents(study / "models/slm") == contents(study / "at-once")
    assert {path.name for path in (study / "models").iterdir()} == {"llm", "slm"}


def test_other_inputs_are_refused_until_overwrite(study: Path) -> None:
    put(study, "gpt2")
    sheared(study)
    with pytest.raises(Refused, match="models/slm was sheared from other inputs; changed since: layers") as refused:
        sheared(study, layers=3)
    assert "--overwrite" in str(refused.value.mend)
    assert sheared(study, layers=3, overwrite=True)["layers"] == 3
    assert len(json.loads((study / "models/slm/shearing.json").read_text())["kept"]) == 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_shear_did_not_make_is_never_replaced(overwrite: bool, study: Path) -> None:
    before = contents(study / "models/llm")
    with pytest.raises(Refused, match="models/llm is there already and was not sheared here"):
        sheared(study, layers=1, folder=study / "models/llm", overwrite=overwrite)
    assert contents(study / "models/llm") == before


# --- refused, before a weight is read


def quantised(study: Path) -> dict[str, Any]:
    edit(
        study / "fedcollm.toml", '[llm]\nmodel = "models/llm"\n', '[llm]\nmodel = "models/llm"\nquantization = "4bit"\n'
    )
    return {}


def no_auxiliary(study: Path) -> dict[str, Any]:
    (study / "private/server/auxiliary.jsonl").unlink()
    return {}


def taken(study: Path) -> dict[str, Any]:
    shutil.copytree(study / "models/llm", study / "taken")
    return {"folder": study / "taken"}


def of_no_files(study: Path) -> dict[str, Any]:
    (study / "made").mkdir()
    (study / "made/shearing.json").write_text('{"format": "fedcollm-shear/1", "files": {"config.json": "0e"}}')
    return {"folder": study / "made", "overwrite": True}


def onto_itself(study: Path) -> dict[str, Any]:
    """The base in [llm] was sheared itself, into the folder that is written if nothing else is said."""
    put(study, "gpt2")
    sheared(study, layers=3)
    edit(study / "fedcollm.toml", '"models/llm"', '"models/slm"')
    return {"folder": study / "models/slm", "overwrite": True}


REFUSED = {
    "below a file": (
        lambda study: {"folder": study / "fedcollm.toml/slm"},
        UsageProblem,
        "fedcollm.toml/slm cannot be made: fedcollm.toml is no folder",
        "--to",
    ),
    "in the base": (
        lambda study: {"folder": study / "models/llm/slm"},
        UsageProblem,
        "models/llm/slm is in the folder of the base that it is made from",
        "--to",
    ),
    "a record of nothing": (of_no_files, Damaged, "shearing.json of made does not say which files it is of", "--to"),
    "no end to the learning rate": (
        lambda _: {"heal": Heal(steps=1, learning_rate=float("inf")), "on_auxiliary": True},
        UsageProblem,
        "the learning rate is inf",
        "such as 3e-4",
    ),
    "a folder of others": (taken, Refused, "taken is there already and was not sheared here", "--to"),
    "no layer": (lambda _: {"layers": 0}, UsageProblem, "0 layers cannot be kept of a model that has 2", "from 1 to 1"),
    "no neuron": (lambda _: {"neurons": 0}, UsageProblem, "0 neurons cannot be kept of MLPs that have", "from 1 to"),
    "all neurons": (
        lambda _: {"neurons": 128},
        UsageProblem,
        "128 neurons cannot be kept of MLPs that have 128",
        "127",
    ),
    "all layers": (
        lambda _: {"layers": 2},
        UsageProblem,
        "2 layers cannot be kept of a model that has 2",
        "from 1 to 1",
    ),
    "4 bits": (quantised, UsageProblem, "agreed to be held in 4bit", "llm.quantization is left out"),
    "healing without text": (lambda _: {"heal": Heal(steps=1)}, UsageProblem, "healing needs text", "--text"),
    "no text at all": (no_auxiliary, NotReady, "there is no text to choose layers on", "--text"),
    "a wrong name": (
        lambda study: {"texts": [study / "corpsu.txt"]},
        NotReady,
        "corpsu.txt is not there",
        "put it there, or correct the name",
    ),
    "a folder": (
        lambda study: {"texts": [study / "tasks"]},
        Damaged,
        "tasks is not a plain file, but a pipe, a device or a folder",
        "put a plain file in its place, or name another",
    ),
    "a short text": (lambda _: {"length": 64}, UsageProblem, "the text is too short", "--length"),
    "no learning rate": (
        lambda _: {"heal": Heal(steps=1, learning_rate=0.0), "on_auxiliary": True},
        UsageProblem,
        "the learning rate is 0",
        "above 0",
    ),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_cannot_be_is_refused_before_a_weight_is_read(which: str, study: Path) -> None:
    words, kind, message, mend = REFUSED[which]
    given = {"layers": 1, **words(study)}
    path = study / "models/llm/model.safetensors"
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(path).items()}
    save_file(broken, path, metadata={"format": "pt"})  # which would be another error
    with pytest.raises(Problem) as refused:
        sheared(study, **given)
    assert type(refused.value) is kind
    assert message in refused.value.message
    assert mend in str(refused.value.mend)
    assert not (study / "models/slm").exists()


def test_a_base_is_not_replaced_by_what_is_made_from_it(study: Path) -> None:
    words = onto_itself(study)
    before = contents(study / "models/slm")
    with pytest.raises(UsageProblem, match="models/slm is the folder of the base that it is made from"):
        sheared(study, **words)
    assert contents(study / "models/slm") == before


def of_model_type(study: Path, model_type: str, **shape: Any) -> Any:
    """Give the workspace an LLM of this architecture with the tokenizer that is there."""
    folder = study / "models/llm"
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    ids = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape, **ids))
    model.save_pretrained(folder)
    return model


def test_a_block_of_gpt_neo_is_found_by_its_new_number(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention calls the number of its block layer_id, and every second block sees 4 tokens alone."""
    shape = {"num_layers": 4, "num_heads": 2, "hidden_size": 32, "max_position_embeddings": 64, "window_size": 4}
    whole = of_model_type(
        study, "gpt_neo", **shape, attention_types=[[["global", "local"], 2]], initializer_range=0.2
    ).eval()
    monkeypatch.setattr(blocks, "most_influential", lambda _influence, _layers: [1, 3])
    assert sheared(study)["kept"] == [1, 3]
    cut = AutoModelForCausalLM.from_pretrained(study / "models/slm").eval()
    ids = torch.arange(2, 18)[None]
    whole.transformer.h = torch.nn.ModuleList([whole.transformer.h[1], whole.transformer.h[3]])
    torch.testing.assert_close(cut(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)


def test_a_cut_that_does_not_compute_is_told(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of RecurrentGemma's blocks one at least must have attention."""
    shape = {"num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    of_model_type(study, "recurrent_gemma", **shape)
    monkeypatch.setattr(blocks, "most_influential", lambda _influence, _layers: [0, 1])
    with pytest.raises(BadNumbers, match="the cut model does not compute: ") as refused:
        sheared(study)
    assert "take another model" in str(refused.value.mend)
    assert not (study / "models/slm").exists()


def test_settings_of_layers_that_are_not_known_are_found_before_healing(study: Path) -> None:
    """Of Qwen2-MoE, mlp_only_layers names layers by their numbers, which are others after the cut."""
    folder = study / "models/llm"
    put(study, "qwen2")
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    config = AutoConfig.for_model("qwen2_moe", **shape, **experts, mlp_only_layers=[0], vocab_size=vocabulary)
    model = AutoModelForCausalLM.from_config(config)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        torch.nn.init.zeros_(model.model.layers[0].get_submodule(name).weight)  # so that layer 0 goes
    model.save_pretrained(folder)
    with pytest.raises(BadNumbers, match="makes a model of other weights"):
        sheared(study, heal=Heal(steps=1000000), on_auxiliary=True)
    assert not (study / "models/slm").exists()


def test_weights_that_are_not_there_are_told_as_everywhere(study: Path) -> None:
    weights = study / "models/llm/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Damaged, match=r"model\.safetensors is cut short or damaged"):
        sheared(study, layers=1)
    assert drafts(study) == []
