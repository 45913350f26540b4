"""Two models of two tokenizers cannot teach each other: every command that can know it says so before work is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest

from builders import Outcome, edit, make_unlike_workspace, published
from stages.bases import one_tokenizer
from stages.models.loading import Models
from stages.progress.status import status
from stages.runtime.errors import UsageProblem
from stages.workspace.paths import Workspace

# <unk> <eos> red blue green: token 4
FOUND = "the tokenizers differ: token 4 is 'green' for the SLM, 'square' for the LLM"


def swapped(folder: Path) -> None:
    """Let two words of the LLM's tokenizer change places."""
    words = folder / "tokenizer.json"
    text = words.read_text()
    words.write_text(text.replace('"green"', '"x"').replace('"square"', '"green"').replace('"x"', '"square"'))


@pytest.fixture
def two(workspace_folder: Path, base_models: Path) -> Path:
    """A simulation whose LLM has a tokenizer of its own; its rows are to be dealt from a file, and no stage has run."""
    (workspace_folder / "models").unlink()
    shutil.copytree(base_models, workspace_folder / "models")
    swapped(workspace_folder / "models/llm")
    toml = workspace_folder / "fedcollm.toml"
    toml.write_text(toml.read_text() + '\n[data]\nfiles = ["data/all.jsonl"]\n')
    shutil.copy(workspace_folder / "private/client-1/train.jsonl", workspace_folder / "data/all.jsonl")
    (workspace_folder / "machine.toml").write_text("simulation = true\n")
    return workspace_folder


@pytest.mark.parametrize(
    "words",
    [
        "plan",
        "prepare --overwrite",
        "broadcast --round 1",
        "next",
        "next --server",
        "run",
        "compare --seeds 7 --methods fedavg,fedcollm",
        "sweep --set distillation.lambda_slm=0.5,1",
        "compare --seeds 7 --slurm",
        "sweep --set distillation.lambda_slm=0.5,1 --slurm",
        "slurm",
        "slurm --jobs",
    ],
)
def test_every_command_at_the_beginning_refuses_two_tokenizers_alike(
    two: Path, fedcollm: Callable[..., Outcome], words: str
) -> None:
    before = published(two)
    found = fedcollm(*words.split(), "-w", two)
    assert found.code == UsageProblem.exit_code
    assert f"error: {FOUND}\n" in found.err
    assert "mend  mutual distillation needs one tokenizer: take both models from one family" in found.err
    assert published(two) == before


def test_status_names_no_next_command_but_the_reason(two: Path, fedcollm: Callable[..., Outcome]) -> None:
    found = fedcollm("status", "-w", two)
    assert f"cannot go on: {FOUND}; mutual distillation needs one tokenizer" in found.out
    assert "next: " not in found.out
    told = json.loads(fedcollm("status", "--json", "-w", two).out)
    assert (told["next_command"], told["waiting_for"]) == ("", "")
    assert told["unfit"].startswith(FOUND)


def test_status_does_not_send_anybody_into_co_distill_with_two_tokenizers(
    answered: Path, fedcollm: Callable[..., Outcome], base_models: Path
) -> None:
    assert fedcollm("aggregate", "--round", 1, "-w", answered).code == 0
    assert "next: fedcollm co-distill" in fedcollm("status", "-w", answered).out
    (answered / "models").unlink()
    shutil.copytree(base_models, answered / "models")
    swapped(answered / "models/llm")
    assert status(Workspace(answered)).next_command is None
    found = fedcollm("next", "--server", "-w", answered)
    assert (found.code, FOUND in found.err) == (UsageProblem.exit_code, True)


def test_what_is_finished_stays_done(finished: Path, base_models: Path) -> None:
    (finished / "models").unlink()
    shutil.copytree(base_models, finished / "models")
    swapped(finished / "models/llm")
    found = status(Workspace(finished))
    assert (found.unfit, str(found.next_command)) == ("", "fedcollm evaluate --round 2 --model slm")


@pytest.mark.parametrize("method", ["fedavg", "standalone"])
def test_a_method_that_trains_no_llm_takes_any_two_tokenizers(two: Path, method: str) -> None:
    edit(two / "fedcollm.toml", "seed = 7\n", f'seed = 7\nmethod = "{method}"\n')
    one_tokenizer.check(Workspace(two))
    assert status(Workspace(two)).next_command is not None


def test_fedmkt_takes_any_two_tokenizers(unlike_folder: Path) -> None:
    one_tokenizer.check(Workspace(unlike_folder))
    assert status(Workspace(unlike_folder)).next_command is not None


def test_a_token_that_claims_the_number_of_another_is_read_as_transformers_reads_it(
    workspace_folder: Path, base_models: Path
) -> None:
    (workspace_folder / "models").unlink()
    shutil.copytree(base_models, workspace_folder / "models")
    words = workspace_folder / "models/llm/tokenizer.json"
    whole = json.loads(words.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    whole["added_tokens"].append({"id": 4, "content": "<late>", "special": True, **flags})
    words.write_text(json.dumps(whole))
    Models(Workspace(workspace_folder)).check_both()
    one_tokenizer.check(Workspace(workspace_folder))


def test_where_a_model_is_elsewhere_or_its_words_cannot_be_read_nothing_is_said(two: Path) -> None:
    words = two / "models/llm/tokenizer.json"
    for content in ("{", '{"model": 5, "added_tokens": {}}', '{"model": {"vocab": {"green": "4"}}}'):
        words.write_text(content)
        one_tokenizer.check(Workspace(two))
    shutil.rmtree(two / "models/llm")
    one_tokenizer.check(Workspace(two))


@pytest.mark.parametrize(("slm", "llm"), list(combinations(["slm-1", "slm-2", "slm-3", "llm"], 2)))
def test_files_tell_of_every_two_kinds_of_tokenizer_what_transformers_does(
    tmp_path: Path, unlike_models: Path, slm: str, llm: str
) -> None:
    folder = make_unlike_workspace(tmp_path / "study", unlike_models)
    toml = folder / "fedcollm.toml"
    head, _, _ = toml.read_text().partition("[clients.2.slm]")
    toml.write_text(head.replace('"fedmkt"', '"fedcollm"'))
    (folder / "machine.toml").write_text(f'[models]\nslm = "models/{slm}"\nllm = "models/{llm}"\n')
    workspace = Workspace(folder)
    with pytest.raises(UsageProblem) as by_files:
        one_tokenizer.check(workspace)
    with pytest.raises(UsageProblem) as by_transformers:
        Models(workspace).check_both()
    assert str(by_files.value) == str(by_transformers.value)
    assert by_files.value.mend == by_transformers.value.mend
