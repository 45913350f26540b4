"""A or B alone: what clients train and send, what stays as it was or their own, and that no mean loses anything."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from pydantic import ValidationError

from builders import adapters, edit, make_workspace, sign
from stages.aggregate import aggregate
from stages.aggregation.drift import drift
from stages.artefacts.parts import start_of
from stages.audit.audit import audit
from stages.audit.verify import verify
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.co_distill import co_distill
from stages.export.export import export
from stages.federation.run import run
from stages.parties.party import Party
from stages.planning.comm_cost import comm_cost
from stages.planning.plan import plan
from stages.progress.status import status
from stages.runtime.errors import Damaged, Problem, Refused, UsageProblem
from stages.study import variants
from stages.workspace.agreement import Agreement
from stages.workspace.averaging import Aggregation
from stages.workspace.commands import Command
from stages.workspace.methods import Method
from stages.workspace.names import ADAPTER_WEIGHTS, MASKED_UPDATE
from stages.workspace.paths import Workspace

Tensors = dict[str, np.ndarray]
Once = Callable[[str, Callable[[Path], None]], Path]
SETTINGS = {
    "freeze-a": 'combine = "freeze-a"',
    "alternate": 'combine = "alternate"',
    "personal": 'personal = "B"',
    "secure": 'combine = "freeze-a"\nmode = "secure"\nmax_update_value = 1.0',
    "secure-personal": 'personal = "B"\nmode = "secure"\nmax_update_value = 1.0',
}
SENT = {"freeze-a": ("B", "B"), "alternate": ("B", "A"), "personal": ("A", "A")}


def tensors(folder: Path) -> Tensors:
    return safetensors.numpy.load((folder / "adapter_model.safetensors").read_bytes())


def save(folder: Path, found: Tensors) -> None:
    (folder / "adapter_model.safetensors").write_bytes(safetensors.numpy.save(found, metadata={"format": "pt"}))


def of(factor: str, found: Tensors) -> Tensors:
    return {name: tensor for name, tensor in found.items() if f".lora_{factor}." in name}


def with_settings(folder: Path, lines: str) -> Path:
    edit(folder / "fedcollm.toml", "[distillation]", f"[aggregation]\n{lines}\n\n[distillation]")
    return folder


@pytest.fixture(scope="session")
def ran(once: Once, base_models: Path) -> Callable[[str], Path]:
    """A workspace of such settings in which both rounds are done; to be read only."""

    def fill(top: Path, name: str) -> None:
        folder = with_settings(make_workspace(top / "study", base_models), SETTINGS[name])
        (folder / "machine.toml").write_text(f'secrets = "{top / "secrets"}"\n')
        run(Workspace(folder), scores=False)

    return lambda name: once(f"partly-{name}", lambda top: fill(top, name)) / "study"


@pytest.fixture
def own(ran: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Such a workspace of one's own."""
    return lambda name: shutil.copytree(ran(name), tmp_path / "study", symlinks=True)


@pytest.mark.parametrize("name", SENT)
@pytest.mark.parametrize("round", [1, 2])
def test_one_matrix_of_each_layer_travels_and_the_other_is_the_broadcasts(
    ran: Callable[[str], Path], name: str, round: int
) -> None:
    folder, sent = ran(name), SENT[name][round - 1]
    start = tensors(folder / f"exchange/round-000{round}/broadcast")
    for client in (1, 2, 3):
        kept = tensors(folder / f"private/client-{client}/round-000{round}/slm")
        update = tensors(folder / f"exchange/round-000{round}/client-{client}")
        assert update.keys() == of(sent, kept).keys()
        for key, tensor in update.items():
            np.testing.assert_array_equal(tensor, kept[key])
            assert not np.array_equal(tensor, start[key])
        if name != "personal":
            for key in kept.keys() - update.keys():
                np.testing.assert_array_equal(kept[key], start[key])


@pytest.mark.parametrize("name", ["freeze-a", "alternate"])
@pytest.mark.parametrize("round", [1, 2])
def test_what_is_aggregated_is_the_mean_of_the_products(ran: Callable[[str], Path], name: str, round: int) -> None:
    folder = ran(name)
    average = tensors(folder / f"private/server/round-000{round}/aggregate")
    layer = next(iter(average)).partition(".lora_")[0]

    def product(found: Tensors) -> np.ndarray:
        wide = {key: tensor.astype(np.float64) for key, tensor in found.items()}
        return wide[f"{layer}.lora_B.weight"] @ wide[f"{layer}.lora_A.weight"]

    each = [product(tensors(folder / f"private/client-{k}/round-000{round}/slm")) for k in (1, 2, 3)]
    mean = np.mean(each, axis=0)
    assert np.abs(mean).max() > 1e-3
    np.testing.assert_allclose(product(average), mean, atol=1e-6 * np.abs(mean).max())


def test_a_stays_as_the_seed_made_it_at_every_party(ran: Callable[[str], Path]) -> None:
    folder = ran("freeze-a")
    first = of("A", tensors(folder / "exchange/round-0001/broadcast"))
    for place in ("exchange/round-0002/broadcast", "private/server/round-0002/slm", "private/client-2/round-0002/slm"):
        found = tensors(folder / place)
        for key, tensor in first.items():
            np.testing.assert_array_equal(found[key], tensor)
    learned = tensors(folder / "private/server/round-0001/slm"), tensors(folder / "private/server/round-0001/aggregate")
    assert all(not np.array_equal(learned[0][key], learned[1][key]) for key in of("B", learned[0]))


def test_each_client_goes_on_with_its_own_b(ran: Callable[[str], Path]) -> None:
    folder = ran("personal")
    ends = [of("B", tensors(folder / f"private/client-{k}/round-0001/slm")) for k in (1, 2, 3)]
    key = next(iter(ends[0]))
    assert not np.array_equal(ends[0][key], ends[1][key])
    parents = json.loads((folder / "private/client-1/round-0002/slm/manifest.json").read_text())["parents"]
    assert parents.keys() == {"broadcast", "own-round-0001"}
    sent = json.loads((folder / "exchange/round-0002/client-1/manifest.json").read_text())["parents"]
    assert sent.keys() == {"broadcast"}
    party = Party.client(Workspace(folder), 2)
    start = start_of(party, 2).adapter(party.workspace.agreement)
    assert start is not None
    begins = safetensors.numpy.load(start.contents[ADAPTER_WEIGHTS])
    for name, tensor in tensors(folder / "exchange/round-0002/broadcast").items():
        np.testing.assert_array_equal(begins[name], ends[1].get(name, tensor))


def test_a_client_that_was_absent_goes_on_from_its_last_round(workspace_folder: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", "rounds = 2", "rounds = 3")
    workspace = Workspace(with_settings(workspace_folder, 'personal = "B"\nmin_clients = 2'))
    for round in (1, 2, 3):
        broadcast(workspace, round=round)
        for client in (1, 2, 3) if round != 2 else (2, 3):
            made = client_train(workspace, client=client, round=round)
            assert made.parents.keys() == {"broadcast"}
        aggregate(workspace, round=round)
        co_distill(workspace, round=round)
    parents = json.loads((workspace_folder / "private/client-1/round-0003/slm/manifest.json").read_text())["parents"]
    before = (workspace_folder / "private/client-1/round-0001/slm/manifest.json").read_bytes()
    assert parents["own-round-0001"] == hashlib.sha256(before).hexdigest()
    assert {finding.level for finding in audit([workspace_folder])} <= {"OK", "SKIP"}


@pytest.mark.parametrize(("plain", "secure"), [("freeze-a", "secure"), ("personal", "secure-personal")])
def test_in_secure_mode_the_sum_is_the_same_and_as_short(ran: Callable[[str], Path], plain: str, secure: str) -> None:
    place = "private/server/round-0001/aggregate"
    found, expected = tensors(ran(secure) / place), tensors(ran(plain) / place)
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], atol=1e-7)
    manifest = json.loads((ran(secure) / "exchange/round-0001/client-1/manifest.json").read_text())
    sent = of(SENT[plain][0], tensors(ran(plain) / "exchange/round-0001/broadcast"))
    assert manifest["parameters"] == sum(tensor.size for tensor in sent.values())
    masked = (ran(secure) / f"exchange/round-0001/client-1/{MASKED_UPDATE}").stat().st_size
    assert masked < 4 * (manifest["parameters"] + 3) + 200


@pytest.mark.parametrize("name", SETTINGS)
def test_audit_verify_and_status_are_content(ran: Callable[[str], Path], name: str) -> None:
    workspace = Workspace(ran(name))
    findings = audit([workspace.root])
    assert {one.level for one in findings} <= {"OK", "SKIP"}
    verify(workspace)
    said = status(workspace)
    assert "evaluate" in str(said.next_command)
    assert not said.is_damaged
    if "secure" not in name:
        assert any(one.id == "A6" and "2 rounds" in one.found for one in findings)


def test_audit_of_an_exchange_alone_sees_what_is_sent(ran: Callable[[str], Path], tmp_path: Path) -> None:
    place = shutil.copytree(ran("alternate") / "exchange", tmp_path / "exchange")
    findings = audit([place])
    assert {one.level for one in findings} <= {"OK", "SKIP"}
    assert any(one.id == "A6" and "2 rounds" in one.found for one in findings)


def test_drift_is_of_what_is_trained(ran: Callable[[str], Path]) -> None:
    found = drift(Workspace(ran("freeze-a")), 1)
    start = tensors(ran("freeze-a") / "exchange/round-0001/broadcast")
    for one in found:
        update = tensors(ran("freeze-a") / f"exchange/round-0001/client-{one.client}")
        moved = np.concatenate([(update[key].astype(np.float64) - start[key]).ravel() for key in update])
        assert one.norm == pytest.approx(np.linalg.norm(moved), rel=1e-6)


@pytest.mark.parametrize("name", SENT)
def test_bytes_are_those_of_the_files(ran: Callable[[str], Path], name: str) -> None:
    workspace = Workspace(ran(name))
    sizes = [
        (workspace.root / f"exchange/round-000{round}/client-1/adapter_model.safetensors").stat().st_size
        for round in (1, 2)
    ]
    cost, planned = comm_cost(workspace).full, plan(workspace)
    assert cost is not None
    assert cost.update_bytes == planned.sent["client"] == sum(sizes) // 2
    assert cost.update_bytes < cost.adapter_bytes
    assert planned.sent["server"] == 3 * cost.adapter_bytes


def test_where_nobody_trains_the_servers_b_its_slm_scores_as_its_base(workspace_folder: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", "seed = 7\n", 'seed = 7\nmethod = "fedavg"\n')
    edit(workspace_folder / "fedcollm.toml", "rounds = 2", "rounds = 1")
    folder = with_settings(workspace_folder, SETTINGS["personal"])
    run(Workspace(folder))
    scored, base = (
        json.loads((folder / f"results/{name}.json").read_text())["tasks"]
        for name in ("round-0001/aggregate", "zero-shot/slm")
    )
    assert scored == base
    assert {one.level for one in audit([folder])} <= {"OK", "SKIP"}


# --- what is refused


def changed(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Client 2's update of round 1, otherwise; nothing was made of it yet."""
    for place in ("private/server/round-0001", "private/server/round-0002", "exchange/round-0002"):
        shutil.rmtree(folder / place)
    place = folder / "exchange/round-0001/client-2"
    made = change(tensors(place))
    save(place, made)
    sign(place, parameters=sum(tensor.size for tensor in made.values()))
    return folder


def with_a(found: Tensors) -> Tensors:
    return found | {key.replace("lora_B", "lora_A"): np.ones((4, 16), np.float32) for key in found}


def a_alone(found: Tensors) -> Tensors:
    return {key.replace("lora_B", "lora_A"): np.ones((4, 16), np.float32) for key in found}


@pytest.mark.parametrize(
    ("change", "words"),
    [(with_a, "lora_A.weight, which the agreement has nobody send"), (a_alone, "lacks .*lora_B.weight")],
)
def test_the_server_refuses_what_is_not_to_be_sent(
    own: Callable[[str], Path], change: Callable[[Tensors], Tensors], words: str
) -> None:
    folder = changed(own("freeze-a"), change)
    with pytest.raises(Damaged, match=words) as raised:
        aggregate(Workspace(folder), round=1)
    assert "client-2" in str(raised.value.where)
    assert not (folder / "private/server/round-0001/aggregate").exists()
    assert any(one.level == "FAIL" and one.id == "A3" and "client-2" in one.where for one in audit([folder]))


def test_a_client_that_moved_a_sends_nothing(own: Callable[[str], Path]) -> None:
    folder = own("freeze-a")
    kept, sent = folder / "private/client-2/round-0002/slm", folder / "exchange/round-0002/client-2"
    found = tensors(kept)
    save(kept, found | {key: tensor + 1 for key, tensor in of("A", found).items()})
    sign(kept)
    shutil.rmtree(sent)
    with pytest.raises(Refused, match=r"lora_A\.weight is not the broadcast's"):
        client_train(Workspace(folder), client=2, round=2)
    assert not sent.exists()


def test_what_was_sent_is_sent_again_alike_where_it_is_lost_or_damaged(own: Callable[[str], Path]) -> None:
    folder = own("alternate")
    before, workspace = adapters(folder), Workspace(folder)
    place = folder / "exchange/round-0002/client-3"
    shutil.rmtree(place)
    client_train(workspace, client=3, round=2)
    assert adapters(folder) == before
    (place / "adapter_model.safetensors").write_bytes(b"")
    client_train(workspace, client=3, round=2)
    assert adapters(folder) == before
    client_train(workspace, client=3, round=2, overwrite=True)
    assert adapters(folder) == before


def test_methods_that_average_nothing_train_both(base_models: Path, tmp_path: Path) -> None:
    folder = with_settings(make_workspace(tmp_path / "study", base_models), SETTINGS["freeze-a"])
    edit(folder / "fedcollm.toml", "seed = 7\n", 'seed = 7\nmethod = "standalone"\n')
    workspace = Workspace(folder)
    broadcast(workspace, round=1)
    client_train(workspace, client=1, round=1)
    start, end = (tensors(folder / f"exchange/round-0001/{name}") for name in ("broadcast", "client-1"))
    assert all(not np.array_equal(start[key], end[key]) for key in start)


def test_with_differential_privacy_b_alone_is_trained_and_sent(workspace_folder: Path) -> None:
    pytest.importorskip("opacus")
    toml = workspace_folder / "fedcollm.toml"
    edit(toml, "[distillation]", "[privacy]\nnoise_multiplier = 0.5\n\n[distillation]")
    workspace = Workspace(with_settings(workspace_folder, SETTINGS["freeze-a"]))
    broadcast(workspace, round=1)
    for client in (1, 2, 3):
        client_train(workspace, client=client, round=1)
    aggregate(workspace, round=1)
    start, average = tensors(workspace.broadcast(1)), tensors(workspace.aggregate(1))
    assert all(np.array_equal(start[key], average[key]) == (".lora_A." in key) for key in start)
    assert {one.level for one in audit([workspace_folder])} <= {"OK", "SKIP"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"combine": "freeze-a", "personal": "B"}, "personal is for A and B that are averaged apart"),
        ({"combine": "product", "personal": "A"}, "personal is for A and B that are averaged apart"),
        ({"personal": "AB"}, "'A' or 'B'"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, str], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Aggregation.model_validate(settings)


@pytest.mark.parametrize("lines", ['combine = "alternate"', 'personal = "A"'])
def test_fedmkts_average_is_of_whole_adapters(equal_folder: Path, lines: str) -> None:
    edit(equal_folder / "fedcollm.toml", "average = true\n", f"average = true\n{lines}\n")
    with pytest.raises(Problem, match=r"aggregation\.average takes whole adapters"):
        Agreement.model_validate(Workspace(equal_folder).agreement)


def test_a_gate_that_would_only_see_the_base_is_refused(workspace_folder: Path) -> None:
    toml = workspace_folder / "fedcollm.toml"
    edit(toml, "[distillation]", '[aggregation]\npersonal = "B"\ngate = 0.1\n\n[distillation]')
    assert not Workspace(workspace_folder).agreement.server_has_no_b
    workspace = Workspace(workspace_folder)
    expected: dict[Method, float | None] = {"fedavg": None, "fedavg-aux": 0.1}
    for method, gate in expected.items():
        place, changes = variants.baseline(workspace, method)
        made = variants.make_variant(workspace, place, changes, made_by=Command("run", method=method))
        assert made.agreement.aggregation.gate == gate
    edit(toml, "seed = 7", 'seed = 7\nmethod = "fedavg"')
    with pytest.raises(Problem, match=r"aggregation\.gate looks at the server's SLM"):
        _ = Workspace(workspace_folder).agreement
    edit(toml, "gate = 0.1\n", "")
    broadcast(Workspace(workspace_folder), round=1)
    with pytest.raises(UsageProblem, match="whatever is averaged"):
        aggregate(Workspace(workspace_folder), round=1, gate=0.1)


def test_a_server_without_a_b_has_nothing_to_export(workspace_folder: Path) -> None:
    toml = workspace_folder / "fedcollm.toml"
    edit(toml, "[distillation]", '[aggregation]\npersonal = "B"\n\n[distillation]')
    edit(toml, "seed = 7\n", 'seed = 7\nmethod = "fedavg"\n')
    edit(toml, "rounds = 2", "rounds = 1")
    workspace = Workspace(workspace_folder)
    run(workspace, scores=False)
    with pytest.raises(UsageProblem, match="every B is a client's") as raised:
        export(workspace, model="aggregate", round=1)
    assert str(raised.value.mend) == "fedcollm export --client 1 --round 1"
    assert export(workspace, client=1, round=1)


def test_a_has_no_turn_while_b_is_zero_and_the_round_can_be_given_up(workspace_folder: Path) -> None:
    toml = with_settings(workspace_folder, 'combine = "alternate"') / "fedcollm.toml"
    edit(toml, "rounds = 2", 'rounds = 3\nmethod = "fedavg"')
    workspace = Workspace(workspace_folder)
    broadcast(workspace, round=1)
    aggregate(workspace, round=1, keep_old=True)
    broadcast(workspace, round=2)
    with pytest.raises(Problem, match="B is zero in the broadcast of round 2, in which clients train A alone") as found:
        client_train(workspace, client=1, round=2)
    assert "fedcollm aggregate --round 2 --keep-old; B has its turn in the next round" in str(found.value.mend)
    aggregate(workspace, round=2, keep_old=True)
    run(workspace, scores=False)
    assert workspace.aggregate(3).exists()
    assert [one.text for one in audit([workspace_folder]) if one.level == "FAIL"] == []
