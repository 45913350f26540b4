"""ledger: what the folders in exchange/ say has travelled, to the byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from builders import edit
from stages.exchange.transfers import Transfer, transfers
from stages.runtime.errors import Damaged
from stages.workspace.paths import Workspace


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_broadcast_goes_to_every_client_and_each_clients_update_to_the_server(finished: Path) -> None:
    workspace = Workspace(finished)
    found = transfers(workspace)
    for round in (1, 2):
        down, up = workspace.broadcast(round), workspace.client_updates(round)
        # One layer, A of 4 x 16 and B of 48 x 4: PEFT's default for GPT-2 is c_attn.
        parameters = 4 * 16 + 48 * 4
        expected = [Transfer(round, "server", f"client-{k}", bytes_of(down), parameters) for k in (1, 2, 3)]
        expected += [Transfer(round, f"client-{k}", "server", bytes_of(path), parameters) for k, path in up.items()]
        assert [one for one in found if one.round == round] == expected
    assert len(found) == 12


def test_an_averaged_client_of_fedmkt_sends_what_it_knows_and_its_adapter(equal: Path) -> None:
    workspace = Workspace(equal)
    found = [one for one in transfers(workspace) if one.round == 2 and "client-2" in (one.sender, one.receiver)]
    # One layer, A of 4 x 16 and B of 48 x 4, as above.
    parameters = 4 * 16 + 48 * 4
    assert found == [
        Transfer(2, "server", "client-2", bytes_of(workspace.broadcast(2)), parameters),
        Transfer(2, "server", "client-2", bytes_of(workspace.knowledge(2, None)), 0),
        Transfer(2, "client-2", "server", bytes_of(workspace.knowledge(2, 2)), 0),
        Transfer(2, "client-2", "server", bytes_of(workspace.client_update(2, 2)), parameters),
    ]


def test_what_has_not_arrived_is_not_counted(answered: Path) -> None:
    shutil.rmtree(answered / "exchange/round-0001/client-2")
    found = [(one.round, one.sender, one.receiver) for one in transfers(Workspace(answered))]
    assert found == [
        *((1, "server", f"client-{k}") for k in (1, 2, 3)),
        (1, "client-1", "server"),
        (1, "client-3", "server"),
    ]


def test_nothing_has_travelled_in_a_new_workspace(workspace_folder: Path) -> None:
    assert transfers(Workspace(workspace_folder)) == []


def test_nothing_but_manifests_is_opened(finished: Path) -> None:
    before = transfers(Workspace(finished))
    for path in (finished / "exchange").rglob("adapter_*"):
        path.unlink()
    assert transfers(Workspace(finished)) == before


def test_a_manifest_that_cannot_be_read_is_named(finished: Path) -> None:
    edit(finished / "exchange/round-0002/client-1/manifest.json", '"fedcollm/1"', '"fedcollm/9"')
    with pytest.raises(Damaged, match="not a fedcollm/1 manifest") as caught:
        transfers(Workspace(finished))
    assert caught.value.where == finished / "exchange/round-0002/client-1/manifest.json"
    assert caught.value.mend == "copy it again from its origin"


def test_secure_mode_sends_a_close_to_each_and_reveals_back_with_every_signature(summed: Path) -> None:
    workspace = Workspace(summed)
    found = transfers(workspace)
    for round in (1, 2):
        close, manifest = workspace.close(round), ("manifest.json", "manifest.json.sig")
        for k in (1, 2, 3):
            down = [one for one in found if (one.round, one.receiver) == (round, f"client-{k}")]
            own = sum((close / name).stat().st_size for name in (*manifest, f"client-{k}.safetensors"))
            assert [one.size_bytes for one in down] == [bytes_of(workspace.broadcast(round)), own]
            up = [one for one in found if (one.round, one.sender) == (round, f"client-{k}")]
            folders = workspace.client_update(round, k), workspace.reveal(round, k)
            assert [one.size_bytes for one in up] == [bytes_of(folder) for folder in folders]
            assert [one.parameters for one in up] == [4 * 16 + 48 * 4, 0]


def test_before_the_first_round_keys_and_the_roster_travel(enrolled: Path) -> None:
    keys = enrolled / "exchange/keys"
    roster = sum(path.stat().st_size for path in (enrolled / "exchange").glob("federation.json*"))
    found = transfers(Workspace(enrolled))
    assert {one.round for one in found} == {0}
    assert [(one.sender, one.size_bytes) for one in found if one.receiver == "server"] == [
        (f"client-{k}", sum(path.stat().st_size for path in keys.glob(f"client-{k}.json*"))) for k in (1, 2, 3)
    ]
    assert {one.size_bytes for one in found if one.sender == "server"} == {bytes_of(keys) + roster}


def test_a_client_that_the_close_does_not_list_is_sent_none(summed: Path) -> None:
    path = summed / "exchange/round-0001/close/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["client-3.safetensors"]
    path.write_text(json.dumps(manifest))
    found = [one.receiver for one in transfers(Workspace(summed)) if one.round == 1 and one.sender == "server"]
    assert found == ["client-1", "client-2", "client-3", "client-1", "client-2"]
