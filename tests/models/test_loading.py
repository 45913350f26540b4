"""models: base models known by their content, one vocabulary for both, and what is loaded is what was agreed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, normalizers
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import vocabularies
from builders import examples
from stages.artefacts.manifest import BaseIdentity
from stages.models.devices import naming_memory_knobs
from stages.models.identity import PROBE_TEXTS, identify
from stages.models.loading import Models
from stages.models.packing import UNBOUNDED
from stages.models.tuned import Outline
from stages.models.vocabulary import FOLDED, check_one_vocabulary
from stages.runtime.errors import BadNumbers, NotReady, Problem, Refused, UsageProblem
from stages.training.objective import Objective, task_loss
from stages.workspace.paths import Workspace


def identity_of(folder: Path) -> BaseIdentity:
    return identify(folder, AutoTokenizer.from_pretrained(folder))


@pytest.fixture
def llm(base_models: Path, tmp_path: Path) -> Path:
    """A copy of the LLM's folder, to change."""
    return shutil.copytree(base_models / "llm", tmp_path / "another llm")


def rewritten(folder: Path, **save: Any) -> Any:
    """The model in a folder, and a function that saves it there again in its stead."""
    model = AutoModelForCausalLM.from_pretrained(folder)

    def put_back() -> None:
        for path in folder.glob("model*"):
            path.unlink()
        model.save_pretrained(folder, **save)

    return model, put_back


def models_with(folder: Path, settings: str = "", **paths: Path) -> Models:
    """The models of a workspace under this machine.toml, with other local folders."""
    lines = [settings, "[models]", *(f"{role} = {json.dumps(str(path))}" for role, path in paths.items())]
    (folder / "machine.toml").write_text("\n".join(lines) + "\n")
    return Models(Workspace(folder))


# --- identity


def test_a_base_in_one_file_and_in_shards_is_the_same_base(llm: Path) -> None:
    before = identity_of(llm)
    _, put_back = rewritten(llm, max_shard_size="20KB")
    put_back()
    assert len(list(llm.glob("*.safetensors"))) > 1
    assert identity_of(llm) == before


def test_one_other_weight_is_another_base(llm: Path) -> None:
    before = identity_of(llm)
    model, put_back = rewritten(llm)
    with torch.no_grad():
        weight = model.transformer.h[1].mlp.c_fc.bias
        weight[3] = torch.nextafter(weight[3], torch.tensor(1.0))
    put_back()
    after = identity_of(llm)
    assert after.weights_sha256 != before.weights_sha256
    assert (after.architecture, after.tokenizer_sha256) == (before.architecture, before.tokenizer_sha256)


def test_the_same_weights_in_another_precision_are_another_base(llm: Path) -> None:
    before = identity_of(llm)
    model, put_back = rewritten(llm)
    model.bfloat16()
    put_back()
    assert identity_of(llm).weights_sha256 != before.weights_sha256


def test_two_tensors_that_changed_places_are_another_base(llm: Path) -> None:
    before = identity_of(llm)
    model, put_back = rewritten(llm)
    first, second = (layer.attn.c_attn.weight for layer in model.transformer.h)
    first.data, second.data = second.data, first.data
    put_back()
    assert identity_of(llm).weights_sha256 != before.weights_sha256


def test_where_a_base_lies_is_no_part_of_what_it_is(llm: Path, base_models: Path) -> None:
    (llm / "README.md").write_text("moved")
    assert identity_of(llm) == identity_of(base_models / "llm")
    assert identity_of(llm) != identity_of(base_models / "slm")


def test_a_base_other_than_the_broadcasts_is_refused_by_what_differs(
    workspace_folder: Path, base_models: Path, llm: Path
) -> None:
    broadcast = identity_of(base_models / "slm")
    assert models_with(workspace_folder).expect("slm", broadcast, "the broadcast").identity == broadcast
    with pytest.raises(Refused, match="the SLM here is not the one of the broadcast: weights_sha256 is ") as caught:
        models_with(workspace_folder, slm=llm).expect("slm", broadcast, "the broadcast")
    assert "machine.toml" in str(caught.value.mend)


def edited(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.json", {"n_head": 4}),
        ("config.json", {"activation_function": "relu"}),
        ("generation_config.json", {"repetition_penalty": 5.0}),
        ("generation_config.json", {"suppress_tokens": [3, 4]}),
        ("tokenizer_config.json", {"eos_token": "<unk>"}),
        ("tokenizer_config.json", {"pad_token": "<unk>"}),
    ],
)
def test_other_settings_beside_the_same_weights_are_another_base(file: str, values: dict[str, Any], llm: Path) -> None:
    before = identity_of(llm)
    edited(llm / file, **values)
    after = identity_of(llm)
    assert after.differs(before) == "settings_sha256"
    assert (after.weights_sha256, after.tokenizer_sha256) == (before.weights_sha256, before.tokenizer_sha256)


def test_names_versions_and_precisions_are_no_part_of_a_base(llm: Path) -> None:
    before = identity_of(llm)
    edited(llm / "config.json", _name_or_path="elsewhere", dtype="bfloat16", use_cache=False, transformers_version="5")
    edited(llm / "generation_config.json", transformers_version="5.0", use_cache=False)
    assert identity_of(llm) == before
    # A setting left out is its class's default, and how to generate is then what config.json says.
    config = json.loads((llm / "config.json").read_text())
    del config["activation_function"], config["n_inner"]
    (llm / "config.json").write_text(json.dumps(config))
    (llm / "generation_config.json").unlink()
    assert identity_of(llm) == before


def test_a_model_saved_again_in_another_precision_has_the_same_settings(llm: Path) -> None:
    before = identity_of(llm)
    model, put_back = rewritten(llm)
    model.bfloat16()
    put_back()
    assert identity_of(llm).settings_sha256 == before.settings_sha256


def test_a_generation_config_that_cannot_be_read_is_refused(llm: Path) -> None:
    (llm / "generation_config.json").write_text("{")
    with pytest.raises(UsageProblem) as caught:
        identity_of(llm)
    assert str(caught.value.where).endswith("generation_config.json")


def test_a_base_of_an_earlier_version_that_told_no_settings_is_taken(workspace_folder: Path, base_models: Path) -> None:
    earlier = identity_of(base_models / "slm").model_copy(update={"settings_sha256": None})
    assert models_with(workspace_folder).expect("slm", earlier, "the broadcast").identity.is_of(earlier)
    assert not earlier.is_of(earlier.model_copy(update={"tokenizer_sha256": "0" * 64}))


# --- one vocabulary


def retokenised(folder: Path, change: Any) -> None:
    """Change the tokenizer in a model's folder."""
    plain = Tokenizer.from_str(change(AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str()))
    PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(folder)


def shared_vocabulary(workspace_folder: Path, **paths: Path) -> int:
    models = models_with(workspace_folder, **paths)
    return check_one_vocabulary(models.get("slm").outline, models.get("llm").outline)


def test_two_models_with_one_tokenizer_share_all_of_it(workspace_folder: Path) -> None:
    assert shared_vocabulary(workspace_folder) == 2 + 27  # <unk>, <eos> and the words of builders.WORDS


def test_padded_rows_of_the_larger_vocabulary_are_cut_off(workspace_folder: Path, llm: Path) -> None:
    model, put_back = rewritten(llm)
    model.resize_token_embeddings(64, mean_resizing=False)
    put_back()
    assert shared_vocabulary(workspace_folder, llm=llm) == 29


def test_tokenizers_that_differ_are_refused_by_the_first_token_that_does(workspace_folder: Path, llm: Path) -> None:
    def swap(text: str) -> str:
        return text.replace('"green"', '"x"').replace('"square"', '"green"').replace('"x"', '"square"')

    retokenised(llm, swap)
    with pytest.raises(UsageProblem) as caught:
        shared_vocabulary(workspace_folder, llm=llm)
    # <unk> <eos> red blue green: token 4
    assert caught.value.message == "the tokenizers differ: token 4 is 'green' for the SLM, 'square' for the LLM"
    assert "one tokenizer" in str(caught.value.mend)
    assert identity_of(llm).tokenizer_sha256 != models_with(workspace_folder).get("llm").identity.tokenizer_sha256


def test_tokenizers_that_share_a_vocabulary_but_split_text_differently_are_refused(
    workspace_folder: Path, llm: Path
) -> None:
    def split_at_punctuation(text: str) -> str:
        plain = Tokenizer.from_str(text)
        plain.pre_tokenizer = Whitespace()
        return str(plain.to_str())

    retokenised(llm, split_at_punctuation)
    with pytest.raises(UsageProblem, match="split text differently"):
        shared_vocabulary(workspace_folder, llm=llm)


@pytest.mark.parametrize(
    "normaliser",
    [normalizers.NFC(), normalizers.NFD(), normalizers.NFKC(), normalizers.Lowercase(), normalizers.StripAccents()],
    ids=lambda one: type(one).__name__,
)
def test_tokenizers_that_normalise_otherwise_are_refused(normaliser: Any) -> None:
    """NFC, as Qwen's has it, changes no text of the other probes."""
    texts = [*vocabularies.TEXTS, *PROBE_TEXTS, FOLDED]
    plain, changed = (vocabularies.byte_level(500, texts=texts) for _ in range(2))
    changed.backend_tokenizer.normalizer = normaliser
    slm, llm = (Outline(tokenizer, len(tokenizer), 64) for tokenizer in (plain, changed))
    assert check_one_vocabulary(slm, slm) == len(plain)
    with pytest.raises(UsageProblem, match="share a vocabulary but split text differently"):
        check_one_vocabulary(slm, llm)


# --- loading


def test_a_model_is_loaded_once_with_an_adapter_of_the_agreed_shape(workspace_folder: Path) -> None:
    models = models_with(workspace_folder)
    slm = models.get("slm")
    assert models.get("slm") is slm
    assert models.get("llm") is not slm
    assert slm.model.peft_config["default"].r == 4
    assert (slm.context, slm.longest_packed) == (64, UNBOUNDED)
    assert sum(p.numel() for p in slm.model.parameters() if p.requires_grad) == 4 * (16 + 3 * 16)


@pytest.mark.parametrize(("dtype", "autocast"), [("float32", False), ("bfloat16", True)])
def test_the_machines_precision_goes_before_the_agreements_and_weights_stay_float32_on_a_cpu(
    workspace_folder: Path, dtype: str, autocast: bool
) -> None:
    slm = models_with(workspace_folder, f'dtype = "{dtype}"\ndevice = "cpu"').get("slm")
    assert slm.autocast == autocast
    assert {parameter.dtype for parameter in slm.model.parameters()} == {torch.float32}


def test_gradient_checkpointing_saves_memory_and_changes_no_gradient(workspace_folder: Path) -> None:
    found = []
    for setting in ("false", "true"):
        slm = models_with(workspace_folder, f'gradient_checkpointing = {setting}\ndevice = "cpu"').get("slm")
        objective = Objective([slm], task_loss, {"slm_ft": 1.0}).train()
        for number, parameter in enumerate(objective.adapter_parameters("slm")):
            parameter.data.normal_(generator=torch.Generator().manual_seed(number))
        objective(**objective.collate(examples([(5, 2), (3, 4)], vocabulary=29)))["loss"].backward()
        found.append([parameter.grad for parameter in objective.adapter_parameters("slm")])
        assert slm.model.is_gradient_checkpointing == (setting == "true")
    torch.testing.assert_close(found[1], found[0])
    assert all(grad.abs().max() > 0 for grad in found[0])


@pytest.mark.parametrize(
    ("path", "kind", "mend"),
    [
        ("nowhere", NotReady, "machine.toml"),
        ("empty", UsageProblem, "fedcollm.toml"),
        ("broken", UsageProblem, "fedcollm.toml"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_told_with_its_mend(
    workspace_folder: Path, llm: Path, tmp_path: Path, path: str, kind: type[Problem], mend: str
) -> None:
    (tmp_path / "empty").mkdir()
    (llm / "config.json").write_text("{")
    llm.rename(tmp_path / "broken")
    with pytest.raises(kind, match="the SLM") as caught:
        models_with(workspace_folder, slm=tmp_path / path).get("slm")
    assert mend in str(caught.value.mend)


def test_a_hub_id_that_is_not_in_the_cache_is_not_ready_without_a_network(workspace_folder: Path) -> None:
    text = (workspace_folder / "fedcollm.toml").read_text().replace("models/slm", "nobody/no-such-model")
    (workspace_folder / "fedcollm.toml").write_text(text)
    with pytest.raises(NotReady, match="the SLM nobody/no-such-model is neither here nor on the hub") as caught:
        models_with(workspace_folder).get("slm")
    assert "models.slm in machine.toml" in str(caught.value.mend)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused_with_those_that_are(workspace_folder: Path) -> None:
    with pytest.raises(UsageProblem, match="there is no device cuda here") as caught:
        models_with(workspace_folder, 'device = "cuda"')
    assert "--device cpu" in str(caught.value.mend)


# --- memory


def test_running_out_of_memory_names_the_settings_that_need_less() -> None:
    with pytest.raises(BadNumbers, match="out of memory: ") as caught, naming_memory_knobs():
        torch.empty(1 << 55)
    for knob in ("micro_batch", "gradient_checkpointing", "--dtype bfloat16", "max_length"):
        assert knob in str(caught.value.mend)
    with pytest.raises(BadNumbers, match="out of memory: "), naming_memory_knobs():
        raise MemoryError


def test_any_other_failure_of_torch_passes_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="shape"), naming_memory_knobs():
        torch.zeros(2).view(3)
