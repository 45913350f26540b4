"""export: what others load has the logits of base and adapter; nothing in it is about this machine."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard, constants
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from peft import LoraModel, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from builders import Family, edit, make_workspace, scale, tiny_model
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.evaluate import evaluate
from stages.export.export import export
from stages.runtime.errors import BadNumbers, NotReady, UsageProblem
from stages.runtime.events import Event
from stages.workspace.paths import Workspace

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TEXT = "Q : what colour is the big square 1 ? A : red"

SUBJECTS = {
    "slm": ("slm", "private/server/round-0002/slm", {}),
    "llm": ("llm", "private/server/round-0002/llm", {"model": "llm"}),
    "aggregate": ("slm", "private/server/round-0002/aggregate", {"model": "aggregate"}),
    "client-2": ("slm", "exchange/round-0002/client-2", {"client": 2}),
}


@torch.no_grad()
def logits(model: Any, folder: Path) -> torch.Tensor:
    """Of a text after the tokenizer that lies in folder."""
    ids = AutoTokenizer.from_pretrained(folder).encode(TEXT)
    found: torch.Tensor = model.eval()(torch.tensor([ids])).logits
    return found


def load(base: Path, adapter: Path | None = None) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter) if adapter else model


def trained(
    folder: Path, base_models: Path, family: Family, dtype: torch.dtype = torch.float32, slm: str = "models/slm"
) -> Workspace:
    """A workspace whose SLM is of another architecture and precision, after client 1's training of round 1.

    slm: its name in the agreement; machine.toml says where it lies.
    """
    make_workspace(folder, base_models)
    (folder / "models").unlink()
    shutil.copytree(base_models, folder / "models")
    shutil.rmtree(folder / "models/slm")
    tokenizer = AutoTokenizer.from_pretrained(base_models / "slm")
    tiny_model(family, vocabulary=len(tokenizer)).to(dtype).save_pretrained(folder / "models/slm")
    tokenizer.save_pretrained(folder / "models/slm")
    edit(folder / "fedcollm.toml", '"models/slm"', f'"{slm}"')
    if slm != "models/slm":
        (folder / "machine.toml").write_text('[models]\nslm = "models/slm"\n')
    workspace = Workspace(folder)
    broadcast(workspace, round=1)
    client_train(workspace, client=1, round=1)
    return workspace


# --- what others load


@pytest.mark.parametrize("subject", SUBJECTS)
def test_an_exported_adapter_loads_in_peft_as_the_tuned_model(subject: str, finished: Path) -> None:
    role, adapter, words = SUBJECTS[subject]
    export(Workspace(finished), round=2, **words)
    base, folder = finished / "models" / role, finished / f"exports/{subject}-round-0002"
    found = logits(load(base, folder), base)
    assert torch.equal(found, logits(load(base, finished / adapter), base))
    assert not torch.allclose(found, logits(load(base), base), atol=1e-3)
    assert (folder / WEIGHTS).read_bytes() == (finished / adapter / WEIGHTS).read_bytes()
    names = {path.name for path in folder.iterdir()}
    assert names == {WEIGHTS, CONFIG, "README.md", "export.json"}


@pytest.mark.parametrize("subject", ["llm", "client-2"])
def test_a_merged_export_loads_in_transformers_as_the_tuned_model(subject: str, finished: Path) -> None:
    role, adapter, words = SUBJECTS[subject]
    made = export(Workspace(finished), round=2, merged=True, **words)
    base, folder = finished / "models" / role, finished / f"exports/{subject}-round-0002-merged"
    found = logits(load(folder), folder)
    torch.testing.assert_close(found, logits(load(base, finished / adapter), base), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, logits(load(base), base), atol=1e-3)
    assert made["proof"]["error"] < 1e-5 < 1e-3 < made["proof"]["change"]
    assert not (folder / CONFIG).exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((folder / name).read_text()) == json.loads((base / name).read_text())


def test_a_merged_weight_is_w_plus_alpha_over_r_times_b_a(finished: Path) -> None:
    export(Workspace(finished), model="slm", round=2, merged=True)
    adapter = safetensors.torch.load_file(finished / "private/server/round-0002/slm" / WEIGHTS)
    name = "transformer.h.0.attn.c_attn"
    a, b = (adapter[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
    merged = safetensors.torch.load_file(finished / "exports/slm-round-0002-merged/model.safetensors")
    base = safetensors.torch.load_file(finished / "models/slm/model.safetensors")
    expected = base[f"{name}.weight"] + (8 / 4) * (b @ a).T  # alpha 8, r 4; GPT-2's Conv1D holds W transposed
    torch.testing.assert_close(merged[f"{name}.weight"], expected)
    others = base.keys() - {f"{name}.weight"}
    assert merged.keys() == base.keys()
    assert all(torch.equal(merged[other], base[other]) for other in others)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("gpt2", torch.float16),
        ("opt", torch.float32),
        ("opt", torch.float16),
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
    ],
    ids=str,
)
def test_a_merged_model_keeps_the_base_s_precision_ties_and_settings(
    family: Family, dtype: torch.dtype, tmp_path: Path, base_models: Path
) -> None:
    workspace = trained(tmp_path / "study", base_models, family, dtype)
    made = export(workspace, round=1, client=1, merged=True)
    base, folder = tmp_path / "study/models/slm", tmp_path / "study/exports/client-1-round-0001-merged"
    expected = logits(load(base, tmp_path / "study/exchange/round-0001/client-1"), base)
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    assert (logits(load(folder), folder) - expected).abs().max() <= tolerance * expected.abs().max()

    assert made["proof"]["stored_dtype"] == str(dtype).removeprefix("torch.")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == dtype
    is_tied = family != "llama"
    loaded = load(folder)
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == is_tied
    assert ("lm_head.weight" in weights) == (not is_tied)
    assert AutoConfig.from_pretrained(folder).to_dict() == AutoConfig.from_pretrained(base).to_dict() | {
        "_name_or_path": str(folder)
    }
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {(folder / "README.md").stat().st_mode & 0o777}


def test_lm_eval_scores_an_export_as_evaluate_does(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(finished)
    export(workspace, model="llm", round=2)
    export(workspace, model="llm", round=2, merged=True)
    ours = evaluate(workspace, model="llm", round=2)["tasks"]["colours"]["metrics"]["acc"]
    monkeypatch.chdir(finished)  # the task's data files are named from there

    def lm_eval(arguments: str) -> tuple[float, list[float]]:
        """Accuracy, and the log-likelihood of every choice."""
        found = simple_evaluate(
            model="hf",
            model_args=f"{arguments},dtype=float32",
            device="cpu",
            tasks=["colours"],
            task_manager=TaskManager(include_path="tasks", include_defaults=False),
        )
        assert found is not None
        said = [choice[0][0] for sample in found["samples"]["colours"] for choice in sample["resps"]]
        return found["results"]["colours"]["acc,none"], said

    _, base_said = lm_eval("pretrained=models/llm")
    accuracy, said = lm_eval("pretrained=models/llm,peft=exports/llm-round-0002")
    merged_accuracy, merged_said = lm_eval("pretrained=exports/llm-round-0002-merged")
    assert accuracy == merged_accuracy == ours
    assert said == pytest.approx(merged_said, rel=1e-4)
    assert max(abs(tuned - base) for tuned, base in zip(said, base_said, strict=True)) > 0.01


# --- what is not published


def test_merged_weights_too_coarse_for_what_was_tuned_are_not_published(tmp_path: Path, base_models: Path) -> None:
    workspace = trained(tmp_path / "study", base_models, "llama", torch.bfloat16)
    scale(tmp_path / "study/exchange/round-0001/client-1", 1e-4)
    with pytest.raises(BadNumbers, match="bfloat16 does not keep what was tuned") as caught:
        export(workspace, round=1, client=1, merged=True)
    assert "without --merged" in str(caught.value.mend)
    assert list((tmp_path / "study/exports").iterdir()) == []
    export(workspace, round=1, client=1)


def test_merged_weights_that_lose_a_good_part_of_what_was_tuned_are_published_with_a_warning_each_time(
    tmp_path: Path, base_models: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    workspace = trained(tmp_path / "study", base_models, "llama", torch.bfloat16)
    proof = export(workspace, round=1, client=1, merged=True)["proof"]
    # What is lost by rounding stays nearly the same, what was tuned shrinks with the adapter.
    scale(tmp_path / "study/exchange/round-0001/client-1", proof["error"] / proof["change"] / 0.3)
    said: list[Event] = []
    capfd.readouterr()
    proof = export(workspace, round=1, client=1, merged=True, overwrite=True, report=said.append)["proof"]
    assert capfd.readouterr() == ("", ""), "no library says anything"
    export(workspace, round=1, client=1, merged=True, report=said.append)
    share = f"{proof['error'] / proof['change']:.0%}"
    told = [event.text for event in said if event.kind == "warning"]
    assert told[0].startswith(f"stored in bfloat16, its logits are off by up to {share} of what tuning changed in them")
    assert told == [told[0]] * 2


def test_a_merge_that_forgets_the_adapter_is_not_published(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda model: model.unload())
    with pytest.raises(BadNumbers, match="logits are not those of base and adapter"):
        export(Workspace(finished), round=2, merged=True)
    assert list((finished / "exports").iterdir()) == []


def test_a_tokenizer_that_arrives_otherwise_is_not_published(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapping(source: Path, target: Path) -> None:
        text = source.read_text().replace('"red"', '"?"', 1).replace('"blue"', '"red"', 1).replace('"?"', '"blue"', 1)
        target.write_text(text)

    monkeypatch.setattr(shutil, "copyfile", swapping)
    with pytest.raises(BadNumbers, match="the export's tokenizer is not the base's"):
        export(Workspace(finished), round=2, merged=True)
    assert list((finished / "exports").iterdir()) == []


def test_an_export_ends_no_text_though_the_base_s_tokenizer_does(tmp_path: Path, base_models: Path) -> None:
    models = shutil.copytree(base_models, tmp_path / "ending")
    words = models / "slm" / "tokenizer.json"
    end: Any = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<eos>", "type_id": 0}}]
    special = {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}}
    ending = {"type": "TemplateProcessing", "single": end, "pair": end, "special_tokens": special}
    words.write_text(json.dumps(json.loads(words.read_text()) | {"post_processor": ending}))
    base: Any = AutoTokenizer.from_pretrained(models / "slm")
    assert base.encode(TEXT)[-1] == 1
    workspace = Workspace(make_workspace(tmp_path / "study", models))
    broadcast(workspace, round=1)
    client_train(workspace, client=1, round=1)
    export(workspace, round=1, client=1, merged=True)
    folder = workspace.export(1, "client-1", merged=True)
    found: Any = AutoTokenizer.from_pretrained(folder)
    assert found.encode(TEXT) == base.encode(TEXT)[:-1]
    assert found.get_vocab() == base.get_vocab()
    assert "the one in this folder does not" in (folder / "README.md").read_text()
    export(workspace, round=1, client=1)
    assert "take it off a prompt" in (workspace.export(1, "client-1", merged=False) / "README.md").read_text()


@pytest.mark.parametrize("place", ["models/slm", "models/slm/merged"])
def test_an_export_never_goes_where_its_base_is(place: str, finished: Path) -> None:
    before = {path: path.read_bytes() for path in (finished / "models/slm").iterdir()}
    with pytest.raises(UsageProblem, match="the folder of the base that it is made from") as refused:
        export(Workspace(finished), round=1, merged=True, folder=finished / place, overwrite=True)
    assert "--to" in str(refused.value.mend)
    assert {path: path.read_bytes() for path in (finished / "models/slm").iterdir()} == before


def test_an_adapter_that_changes_nothing_is_not_published(finished: Path) -> None:
    scale(finished / "private/server/round-0002/slm", 0)
    with pytest.raises(BadNumbers, match="its logits are the base's"):
        export(Workspace(finished), round=2)
    assert list((finished / "exports").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "kind", "message", "mend"),
    [
        ({"round": 9}, UsageProblem, "no round 9", "rounds"),
        ({"round": 1, "client": 9}, UsageProblem, "no client 9", "clients"),
        ({"round": 1, "client": 2, "model": "llm"}, UsageProblem, "exclude each other", "--client 2 alone"),
        ({"round": 1, "model": "llm"}, NotReady, "no adapter at private/server/round-0001/llm", "fedcollm co-distill"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_not_there_is_named(
    words: dict[str, Any], kind: type[Exception], message: str, mend: str, workspace_folder: Path
) -> None:
    with pytest.raises(kind, match=message) as caught:
        export(Workspace(workspace_folder), **words)
    assert mend in str(getattr(caught.value, "mend", ""))


def test_a_client_is_told_that_the_servers_models_are_at_the_server(workspace_folder: Path) -> None:
    (workspace_folder / "private/server/auxiliary.jsonl").unlink()
    with pytest.raises(NotReady, match="no adapter at private/server/round-0001/slm") as caught:
        export(Workspace(workspace_folder), round=1, model="slm")
    assert caught.value.mend == "the server has it; there: fedcollm export --round 1 --model slm"


# --- what is said of it


@pytest.mark.parametrize("merged", [False, True])
def test_nothing_in_an_export_names_this_machine(merged: bool, tmp_path: Path, base_models: Path) -> None:
    workspace = trained(tmp_path / "study", base_models, "gpt2", slm=str(tmp_path / "study/models/../models/slm"))
    settings = tmp_path / "study/models/slm/tokenizer_config.json"  # where transformers used to leave a path
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"name_or_path": str(tmp_path)}))
    evaluate(workspace, client=1, round=1)
    export(workspace, round=1, client=1, merged=merged)
    folder = workspace.export(1, "client-1", merged=merged)
    for path in folder.iterdir():
        content = path.read_bytes()
        if path.suffix == ".safetensors":  # its head: in so many random numbers a short name stands by chance
            content = content[: 8 + int.from_bytes(content[:8], "little")]
        text = content.decode(errors="replace")
        names = (str(tmp_path), "/study", str(Path.home()), "/home/", socket.gethostname())
        assert [name for name in names if re.search(rf"{re.escape(name)}\b", text)] == [], path
        assert "local_files_only" not in text


@pytest.mark.parametrize("merged", [False, True])
def test_a_base_on_a_hub_is_named_with_its_revision(
    merged: bool, tmp_path: Path, base_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = trained(tmp_path / "study", base_models, "gpt2", slm='someone/tiny-slm"\nrevision = "abc')
    cached = tmp_path / "cache/models--someone--tiny-slm"  # its configuration is known here
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/abc").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    shutil.copy(tmp_path / "study/models/slm/config.json", cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    export(workspace, round=1, client=1, merged=merged)
    folder = workspace.export(1, "client-1", merged=merged)
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "someone/tiny-slm"
    assert card.data.library_name == ("transformers" if merged else "peft")
    assert card.data.license is None
    if not merged:
        config = json.loads((folder / CONFIG).read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("someone/tiny-slm", "abc")
        assert 'from_pretrained("someone/tiny-slm", revision="abc")' in card.text


@pytest.mark.parametrize("agreed", ["gpt2", "someone/unknown"])
def test_a_local_folder_that_is_not_the_agreed_model_is_not_called_by_its_name(
    agreed: str, tmp_path: Path, base_models: Path
) -> None:
    workspace = trained(tmp_path / "study", base_models, "llama", slm=agreed)
    told: list[Event] = []
    export(workspace, round=1, client=1, report=told.append)
    folder = workspace.export(1, "client-1", merged=False)
    config = json.loads((folder / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (None, None)
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model is None
    assert agreed not in str(card)
    assert "known by its digests below (llama)" in str(card)
    assert any("it was tuned on the local folder slm (llama)" in str(one.text) for one in told)


def test_a_base_in_a_folder_is_not_named(finished: Path) -> None:
    export(Workspace(finished), round=2)
    folder = finished / "exports/slm-round-0002"
    assert json.loads((folder / CONFIG).read_text())["base_model_name_or_path"] is None
    assert ModelCard.load(folder / "README.md").data.base_model is None
    assert "models/slm" not in (folder / "README.md").read_text()


def test_the_code_of_a_card_loads_the_export(finished: Path) -> None:
    for merged in (False, True):
        export(Workspace(finished), round=2, merged=merged)
        folder = Workspace(finished).export(2, "slm", merged=merged)
        code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        code = code.replace("path/to/this/folder", str(folder)).replace(
            "path/to/the/base", str(finished / "models/slm")
        )
        names: dict[str, Any] = {}
        exec(code, names)
        base = finished / "models/slm"
        expected = logits(load(base, finished / "private/server/round-0002/slm"), base)
        torch.testing.assert_close(logits(names["model"], base), expected, rtol=1e-4, atol=1e-5)
        assert names["tokenizer"].encode(TEXT) == AutoTokenizer.from_pretrained(base).encode(TEXT)


@pytest.mark.parametrize("merged", [False, True])
def test_a_client_s_own_model_is_exported_on_its_own_base(merged: bool, unlike: Path) -> None:
    made = export(Workspace(unlike), round=2, client=3, merged=merged)
    assert (made["subject"], made["base"]["architecture"]) == ("client-3", "opt")
    assert made["proof"]["error"] < made["proof"]["change"] / 2
    folder = Workspace(unlike).export(2, "client-3", merged=merged)
    if merged:
        assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "opt"
    else:
        adapter = unlike / "private/client-3/round-0002/slm/adapter_model.safetensors"
        assert (folder / "adapter_model.safetensors").read_bytes() == adapter.read_bytes()
