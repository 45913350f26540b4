"""missing: everything that a workspace names and that is not here, each with what mends it."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from builders import edit
from stages.planning.missing import Missing, missing
from stages.workspace.init import init
from stages.workspace.paths import Workspace


def test_nothing_is_missing_where_everything_is(workspace_folder: Path) -> None:
    assert missing(Workspace(workspace_folder)) == []


def test_the_papers_setting_lacks_its_models_its_data_and_its_task_on_a_new_machine(tmp_path: Path) -> None:
    workspace = init(tmp_path / "study", template="s1", tasks=["openbookqa"])
    assert "or set simulation = true" in missing(workspace)[2].mend
    edit(workspace.root / "machine.toml", "# simulation = true", "simulation = true")
    found = missing(Workspace(workspace.root))
    assert found[:3] == [
        Missing("the SLM gpt2, of every party", fetching("slm")),
        Missing("the LLM gpt2-large, of the server alone", fetching("llm")),
        Missing("training data", "fedcollm prepare"),
    ]
    assert len(found) == 4
    assert "the dataset of task openbookqa cannot be loaded" in found[3].what
    assert "`fedcollm prefetch`" in found[3].mend


def fetching(role: str) -> str:
    return f"`fedcollm prefetch --model {role}` where there is a network, or set models.{role} in machine.toml"


def test_a_client_s_own_model_is_set_by_the_key_of_that_client_alone(unlike_folder: Path) -> None:
    edit(unlike_folder / "fedcollm.toml", "models/slm-2", "nobody/nothing")
    (found,) = missing(Workspace(unlike_folder))
    fetched = "`fedcollm prefetch --client 2` where there is a network"
    assert found.mend == f"{fetched}, or set models.clients.2 in machine.toml"


def test_a_local_model_is_put_where_the_settings_say(workspace_folder: Path) -> None:
    (workspace_folder / "models").unlink()
    (workspace_folder / "models" / "llm").mkdir(parents=True)
    edit(workspace_folder / "fedcollm.toml", '"models/slm"', '"./models/slm"')
    assert missing(Workspace(workspace_folder)) == [
        Missing("the SLM ./models/slm, of every party", "put it into models/slm, or set models.slm in machine.toml"),
        Missing("the LLM models/llm, of the server alone", "put it into models/llm, or set models.llm in machine.toml"),
    ]


def test_data_of_other_parties_are_not_missing(workspace_folder: Path) -> None:
    for party in ("client-1", "client-3", "server"):
        shutil.rmtree(workspace_folder / "private" / party)
    assert missing(Workspace(workspace_folder)) == []


def test_the_servers_llm_is_not_missing_where_only_clients_are(workspace_folder: Path, unlike_folder: Path) -> None:
    for folder in (workspace_folder, unlike_folder):
        edit(folder / "fedcollm.toml", '"models/llm"', '"nobody/nothing"')
        assert [one.what for one in missing(Workspace(folder))] == ["the LLM nobody/nothing, of the server alone"]
        shutil.rmtree(folder / "private/server")
        assert missing(Workspace(folder)) == []


def test_public_rows_are_missing_at_each_client_here_that_has_none(unlike_folder: Path) -> None:
    shutil.rmtree(unlike_folder / "private/client-1")
    (unlike_folder / "private/client-2/public.jsonl").unlink()
    what = "the public rows, the same file at every party"
    assert missing(Workspace(unlike_folder)) == [Missing(what, "put them into private/client-2/public.jsonl")]
    (unlike_folder / "private/client-3/public.jsonl").unlink()
    (found,) = missing(Workspace(unlike_folder))
    assert found.mend == "put them into private/client-2/public.jsonl, private/client-3/public.jsonl"
    assert missing(Workspace(unlike_folder), clients=[]) == []
    shutil.rmtree(unlike_folder / "private")
    own, public = missing(Workspace(unlike_folder))
    assert own.what == "training data"
    everywhere = (
        "put them into private/client-1/public.jsonl and so on, at the server into private/server/auxiliary.jsonl"
    )
    assert public == Missing(what, everywhere)


def test_parties_with_their_own_data_are_told_where_it_goes(workspace_folder: Path) -> None:
    shutil.rmtree(workspace_folder / "private")
    (found,) = missing(Workspace(workspace_folder))
    assert found.what == "training data"
    assert "private/client-1/train.jsonl" in found.mend


def test_files_to_prepare_from_are_named_one_by_one(workspace_folder: Path) -> None:
    shutil.rmtree(workspace_folder / "private")
    toml = workspace_folder / "fedcollm.toml"
    toml.write_text(toml.read_text() + '\n[data]\nfiles = ["a.jsonl", "data/train.jsonl", "b.jsonl"]\n')
    (workspace_folder / "machine.toml").write_text("simulation = true\n")
    assert [one.what for one in missing(Workspace(workspace_folder))] == [
        "the data file a.jsonl",
        "the data file b.jsonl",
    ]


def test_a_tasks_own_files_are_among_the_missing(workspace_folder: Path) -> None:
    (workspace_folder / "data" / "test.jsonl").unlink()
    (found,) = missing(Workspace(workspace_folder))
    assert "the data of task colours is not there" in found.what
    assert found.mend == "put it there, or check data_files in its task file"


def test_tenseal_is_missing_where_updates_are_to_be_encrypted(
    workspace_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tenseal" else find(name))
    assert missing(Workspace(workspace_folder)) == []
    edit(workspace_folder / "fedcollm.toml", "[evaluation]", '[aggregation]\nmode = "encrypted"\n\n[evaluation]')
    [found] = missing(Workspace(workspace_folder))
    assert (found.what, found.mend) == ("TenSEAL, for aggregation.mode", "pip install 'fedcollm[he]'")


def test_bitsandbytes_is_missing_where_a_base_is_to_be_held_in_few_bits(
    workspace_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    assert missing(Workspace(workspace_folder)) == []
    edit(workspace_folder / "fedcollm.toml", 'model = "models/llm"', 'model = "models/llm"\nquantization = "4bit"')
    (found,) = missing(Workspace(workspace_folder))
    assert (found.what, found.mend) == ("bitsandbytes, for llm.quantization", "pip install 'fedcollm[quant]'")


def test_of_unlike_models_each_client_misses_its_own_and_the_server_none(unlike_folder: Path) -> None:
    assert missing(Workspace(unlike_folder)) == []
    (unlike_folder / "models").unlink()
    found = [one.what for one in missing(Workspace(unlike_folder), scores=False)]
    assert found == [
        "the SLM models/slm-1, of every party",
        "the SLM models/slm-2, of client 2",
        "the SLM models/slm-3, of client 3",
        "the LLM models/llm, of the server alone",
    ]
    for party in ("client-1", "client-3", "server"):
        shutil.rmtree(unlike_folder / "private" / party)
    assert [one.what for one in missing(Workspace(unlike_folder), roles=["slm"], scores=False)] == [found[1]]
    shutil.move(unlike_folder / "private/client-2", unlike_folder / "private/server")
    (unlike_folder / "private/server/train.jsonl").rename(unlike_folder / "private/server/auxiliary.jsonl")
    assert [one.what for one in missing(Workspace(unlike_folder), scores=False)] == [found[3]]
