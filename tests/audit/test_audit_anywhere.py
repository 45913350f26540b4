"""audit of folders that this tool did not make, of what nobody may read, and by hand."""

from __future__ import annotations

import getpass
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from builders import ROOT, make_workspace, rows, sign, write_rows
from damages import (
    CLIENT,
    WEIGHTS,
    config,
    flip,
    problems,
)
from stages.audit.audit import audit
from stages.federation.run import run
from stages.runtime.errors import NotReady, UsageProblem
from stages.workspace.paths import Workspace


@pytest.fixture(scope="session")
def foreign_once(base_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as peft.save_pretrained leaves it, in bfloat16."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("foreign") / "adapter"
    base = AutoModelForCausalLM.from_pretrained(base_models / "slm")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def foreign(foreign_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(foreign_once, tmp_path / "adapter")


def test_a_peft_folder_is_read_whatever_its_type_and_what_peft_leaks_is_found(foreign: Path) -> None:
    found = audit([foreign])
    readme, leak = problems(found)
    assert re.match("A2 WARN .*/README.md: no manifest names it, and it is neither safetensors nor JSON", readme)
    assert re.match("A7 FAIL .*/adapter_config.json: base_model_name_or_path tells an absolute path", leak)
    said = {one.id: one for one in found if one.level == "OK" and one.where}
    assert "2 tensors, BF16, rank 4" in said["A3"].found
    b_norm = np.sqrt(0.25 * 48 * 4)
    assert said["A4"].measured["largest"] >= 0.5
    assert said["A4"].measured["norm"] >= b_norm
    # Every column of B is the same, so that B A has rank 1.
    assert said["A4"].measured["effective_rank/base_model.model.transformer.h.0.attn.c_attn"] == pytest.approx(1)


def test_of_a_foreign_folder_metadata_is_a_warning_and_a_pickle_a_failure(foreign: Path) -> None:
    content = (foreign / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps({"__metadata__": {"format": "pt", "by": "x"}} | json.loads(content[8 : 8 + length]) | {})
    header = header.replace('{"format": "pt"}', '{"format": "pt", "by": "x"}')
    (foreign / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header.encode() + content[8 + length :])
    (foreign / WEIGHTS).with_name("adapter_model.bin").write_bytes(b"\x80")
    said = problems(audit([foreign]))
    assert any(re.match(r"A3 WARN .*carries metadata: by", line) for line in said), said
    assert any(re.match(r"A2 FAIL .*adapter_model.bin: may run code", line) for line in said)


def test_a_round_outside_every_workspace_is_audited_as_far_as_it_goes(finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished / "exchange/round-0001", tmp_path / "post/round-0001")
    assert problems(audit([copy])) == []
    sign(copy / "client-2", parents={"broadcast": "0" * 64})
    assert any("was made from another broadcast" in line for line in problems(audit([copy])))


def test_an_empty_folder_has_nothing_to_check_and_says_so(tmp_path: Path) -> None:
    found = audit([tmp_path])
    assert problems(found) == []
    assert {one.id for one in found if one.level == "SKIP"} >= {"A3", "A4", "A5", "A6", "A7"}


def test_a_workspace_in_which_nothing_was_exchanged_is_not_called_clean(workspace_folder: Path) -> None:
    with pytest.raises(NotReady, match="nothing has been exchanged yet: nothing was checked"):
        audit([workspace_folder])
    (workspace_folder / "exchange/keys").mkdir(parents=True)
    with pytest.raises(NotReady):
        audit([workspace_folder], client=2)
    (workspace_folder / "exchange/keys/client-2.pem").write_text("-----BEGIN PRIVATE KEY-----")
    assert any(line.startswith("A8 FAIL") for line in problems(audit([workspace_folder])))


def test_a_path_that_is_not_there_and_a_file_are_refused_by_name(finished_once: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="there is no such folder"):
        audit([tmp_path / "nowhere"])
    bundle = tmp_path / "tiny-round-0001-client-1.fedcollm"
    bundle.write_bytes(b"...")
    with pytest.raises(UsageProblem, match=r"client-1\.fedcollm is a bundle") as caught:
        audit([bundle])
    assert caught.value.mend == f"unpack it first: fedcollm unpack {bundle}"
    with pytest.raises(UsageProblem, match="is not a folder") as caught:
        audit([finished_once / CLIENT / WEIGHTS])
    assert caught.value.mend == f"fedcollm audit {finished_once / CLIENT}"
    with pytest.raises(UsageProblem, match="there is no client 9"):
        audit([finished_once], client=9)


# --- what nobody may read


def test_no_byte_that_travels_holds_a_string_of_the_data_the_paths_or_the_user(
    base_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canaries = {name: f"canary{name}Zx9Q" for name in ("data", "folder", "user", "models")}
    monkeypatch.setenv("LOGNAME", canaries["user"])
    models = shutil.copytree(base_models, tmp_path / canaries["models"])
    folder = make_workspace(tmp_path / canaries["folder"], models)
    for k in (1, 2, 3):
        marked = [
            {"prompt": f"{row['prompt']} {canaries['data']}", "completion": row["completion"]} for row in rows(12)
        ]
        write_rows(folder / f"private/client-{k}/train.jsonl", marked)
    write_rows(
        folder / "private/server/auxiliary.jsonl", [*rows(11), {"prompt": canaries["data"], "completion": " red"}]
    )
    run(Workspace(folder), scores=False)
    assert getpass.getuser() == canaries["user"]
    every = [path for path in (folder / "exchange").rglob("*") if path.is_file()]
    assert len(every) == 2 * 4 * 3
    for path in every:
        content = path.read_bytes() + str(path.relative_to(folder)).encode()
        assert not [name for name, canary in canaries.items() if canary.encode() in content], path
    assert problems(audit([folder], canaries=list(canaries.values()))) == []
    held = (folder / "private/client-1/train.jsonl").read_bytes()
    assert canaries["data"].encode() in held  # or there was nothing to find


@pytest.mark.parametrize("form", ["here: Zoë", "here: Zo\\u00eb"])
def test_a_canary_is_found_in_any_file_and_as_json_escapes_it(form: str, finished: Path) -> None:
    (finished / CLIENT / "notes.txt").write_text(form)
    said = problems(audit([finished], canaries=["nowhere", "Zoë"]))
    assert f"A7 FAIL {CLIENT}/notes.txt: holds canary string 2" in said


def test_a_canary_is_found_in_the_name_of_a_file(finished: Path) -> None:
    (finished / CLIENT / "Zed.json").write_text("{}")
    assert f"A7 FAIL {CLIENT}/Zed.json: holds canary string 1" in problems(audit([finished], canaries=["Zed"]))


def test_a_digest_is_no_uuid_and_a_name_is_found_as_a_word_alone(finished: Path) -> None:
    config(finished / CLIENT, note=f"{'0123abcd' * 8} x{getpass.getuser()}x and/or 1.2.3")
    assert not [line for line in problems(audit([finished])) if line.startswith("A7")]


# --- by hand


def test_by_hand_too_a_changed_file_is_seen(finished: Path) -> None:
    flip(finished / CLIENT / WEIGHTS)
    page = (ROOT / "docs/how-to/audit.md").read_text()
    [command] = [text for text in re.findall(r"```sh\n(.*?)```", page, re.S) if "sha256sum --check" in text]
    done = subprocess.run(["bash", "-c", command], cwd=finished, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{WEIGHTS}: FAILED" in done.stdout
