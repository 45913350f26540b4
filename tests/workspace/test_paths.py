"""workspace: found like git's, bounded by its agreement, every place its own."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from builders import AGREEMENT, edit
from stages.runtime.errors import Damaged, NotReady, Refused, UsageProblem
from stages.workspace.paths import Flags, Workspace, require


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Three clients, two rounds."""
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "fedcollm.toml").write_text(AGREEMENT)
    return Workspace(tmp_path / "study")


@pytest.mark.parametrize("below", [".", "exchange/round-0001/client-2", "tasks"])
def test_a_workspace_is_found_upwards(workspace: Workspace, below: str) -> None:
    (workspace.root / below).mkdir(parents=True, exist_ok=True)
    assert Workspace.find(workspace.root / below).root == workspace.root


def test_the_nearest_workspace_is_taken(workspace: Workspace) -> None:
    inner = workspace.root / "baselines" / "fedavg"
    inner.mkdir(parents=True)
    (inner / "fedcollm.toml").write_text(AGREEMENT)
    (inner / "exchange").mkdir()
    assert Workspace.find(inner / "exchange").root == inner


def test_a_relative_start_is_meant_from_here(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace.root.parent)
    assert Workspace.find(Path("study")).root == workspace.root


def test_where_there_is_none_one_is_told_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "fedcollm.toml").mkdir()  # a folder of that name is no agreement
    with pytest.raises(UsageProblem, match=r"no workspace here: no fedcollm\.toml") as caught:
        Workspace.find(tmp_path)
    assert caught.value.where == tmp_path
    assert "fedcollm init" in str(caught.value.mend)


@pytest.mark.parametrize("round", [1, 2])
def test_a_round_of_the_agreement_is_a_round(workspace: Workspace, round: int) -> None:
    assert workspace.check_round(round) == round


@pytest.mark.parametrize("round", [-1, 0, 3])
def test_any_other_round_is_refused_with_those_there_are(workspace: Workspace, round: int) -> None:
    with pytest.raises(UsageProblem, match=f"no round {round}: the agreement has rounds 1 to 2"):
        workspace.check_round(round)


def test_clients_count_from_one(workspace: Workspace) -> None:
    assert list(workspace.clients) == [1, 2, 3]
    assert [workspace.check_client(client) for client in workspace.clients] == [1, 2, 3]


@pytest.mark.parametrize("client", [-1, 0, 4])
def test_any_other_client_is_refused_with_those_there_are(workspace: Workspace, client: int) -> None:
    with pytest.raises(UsageProblem, match=f"no client {client}: the agreement has clients 1 to 3"):
        workspace.check_client(client)


def test_updates_are_found_in_the_order_of_the_clients(workspace: Workspace) -> None:
    edit(workspace.root / "fedcollm.toml", "clients = 3", "clients = 12")
    for client in (10, 2, 1):
        workspace.client_update(1, client).mkdir(parents=True)
    workspace.broadcast(1).mkdir()
    workspace.client_update(1, 3).with_name(".client-3.77.partial").mkdir()
    found = Workspace(workspace.root).client_updates(1)
    assert list(found.items()) == [(k, workspace.client_update(1, k)) for k in (1, 2, 10)]
    assert Workspace(workspace.root).client_updates(2) == {}


@pytest.mark.parametrize("name", ["client-1２", "client-１2"])  # digits of another alphabet, which int() reads
def test_digits_that_look_alike_name_no_client(workspace: Workspace, name: str) -> None:
    edit(workspace.root / "fedcollm.toml", "clients = 3", "clients = 12")
    (workspace.client_update(1, 1).parent / name).mkdir(parents=True)
    with pytest.raises(Refused, match=f"{name} is not a client of this federation"):
        workspace.client_updates(1)


@pytest.mark.parametrize("name", ["client-4", "client-0", "client-02", "client-2 (copy)", "client-two", "client-"])
def test_an_update_of_nobody_is_refused_by_name(workspace: Workspace, name: str) -> None:
    (workspace.client_update(1, 1).parent / name).mkdir(parents=True)
    with pytest.raises(
        Refused, match=re.escape(f"{name} is not a client of this federation, which has clients 1 to 3")
    ):
        workspace.client_updates(1)


def test_no_two_things_share_a_place_and_only_exchange_is_carried(workspace: Workspace) -> None:
    private, carried = [workspace.auxiliary_data, workspace.split], []
    for client in workspace.clients:
        private.append(workspace.client_data(client))
    for round in (1, 2):
        carried.append(workspace.broadcast(round))
        private += [workspace.aggregate(round), workspace.slm(round), workspace.llm(round)]
        for stage in ("aggregate", "co-distill"):
            private += [f(stage, round) for f in (workspace.log, workspace.unfinished, workspace.tensorboard)]
        for client in workspace.clients:
            carried.append(workspace.client_update(round, client))
            private += [
                f("client-train", round, client) for f in (workspace.log, workspace.unfinished, workspace.tensorboard)
            ]
    results = [workspace.result(r, subject) for r in (None, 1, 2) for subject in ("slm", "llm", "client-1")]
    places = [*private, *carried, *results]
    assert len(set(places)) == len(places)
    assert all(path.is_relative_to(workspace.private) for path in private)
    assert all(path.is_relative_to(workspace.root / "exchange") for path in carried)
    assert all(path.is_relative_to(workspace.root / "results") for path in results)


def test_every_run_of_every_stage_has_a_seed_of_its_own(workspace: Workspace) -> None:
    runs = list(itertools.product(("broadcast", "omega", "co-distill", "client-train"), range(1, 30), range(30)))
    seeds = [workspace.seed_for(*run) for run in runs]
    assert len(set(seeds)) == len(runs)
    assert all(0 <= seed < 2**31 for seed in seeds)
    elsewhere = Workspace(workspace.root)
    assert [elsewhere.seed_for(*run) for run in runs] == seeds
    edit(workspace.root / "fedcollm.toml", "seed = 7", "seed = 8")
    other_federation = Workspace(workspace.root)
    assert not set(seeds) & {other_federation.seed_for(*run) for run in runs}


def test_without_machine_toml_a_machine_has_the_defaults(workspace: Workspace) -> None:
    assert (workspace.machine.device, workspace.machine.dtype, workspace.machine.checkpoint_steps) == (
        "auto",
        None,
        100,
    )


def test_a_flag_goes_before_machine_toml_and_leaves_the_rest(workspace: Workspace) -> None:
    (workspace.root / "machine.toml").write_text('device = "cuda:1"\ndtype = "bfloat16"\nmicro_batch = 2\n')
    found = Workspace(workspace.root, Flags(device="cpu")).machine
    assert (found.device, found.dtype, found.micro_batch) == ("cpu", "bfloat16", 2)


def test_machine_toml_is_no_part_of_the_agreement(workspace: Workspace) -> None:
    before = workspace.agreement_sha256
    (workspace.root / "machine.toml").write_text('device = "cpu"\n')
    assert Workspace(workspace.root).agreement_sha256 == before
    edit(workspace.root / "fedcollm.toml", "seed = 7", "seed = 7  # a comment")
    assert Workspace(workspace.root).agreement_sha256 != before


@pytest.mark.parametrize("device", ["tpu", "cuda:x", ""])
def test_a_flag_that_names_no_device_is_refused_like_any_setting(workspace: Workspace, device: str) -> None:
    with pytest.raises(UsageProblem, match="device") as caught:
        Workspace(workspace.root, Flags(device=device)).machine  # noqa: B018
    assert caught.value.mend


def test_settings_that_are_a_link_or_no_text_are_refused(workspace: Workspace) -> None:
    (workspace.root / "machine.toml").symlink_to(workspace.root / "elsewhere")  # one's own: a link is read
    (workspace.root / "elsewhere").write_bytes(b"no settings \xff")
    with pytest.raises(UsageProblem, match="not UTF-8"):
        workspace.machine  # noqa: B018
    (workspace.root / "fedcollm.toml").rename(workspace.root / "agreed")
    (workspace.root / "fedcollm.toml").symlink_to(workspace.root / "agreed")
    with pytest.raises(Damaged, match="symbolic link"):
        Workspace(workspace.root).agreement  # noqa: B018


def test_paths_are_shown_from_the_workspace_down(workspace: Workspace) -> None:
    assert workspace.shown(workspace.broadcast(5)) == "exchange/round-0005/broadcast"
    assert workspace.shown(Path("/elsewhere/x")) == "/elsewhere/x"


@pytest.mark.parametrize(("given", "meant"), [("models/slm", "{root}/models/slm"), ("/data/gpt2", "/data/gpt2")])
def test_a_path_in_the_settings_is_absolute_or_from_the_workspace(workspace: Workspace, given: str, meant: str) -> None:
    assert str(workspace.local(given)) == meant.format(root=workspace.root)
    assert workspace.local("~/gpt2") == Path.home() / "gpt2"


def test_what_is_required_is_there_or_not_ready(tmp_path: Path) -> None:
    require(tmp_path, "it is not there", "make it")
    with pytest.raises(NotReady, match="it is not there") as caught:
        require(tmp_path / "x", "it is not there", "make it")
    assert (caught.value.where, caught.value.mend) == (tmp_path / "x", "make it")
