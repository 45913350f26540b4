"""Few numbers of an update: which are sent, what becomes of the others, and what is refused of a sparse file."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from builders import adapters, edit, make_workspace, sign
from stages.aggregate import aggregate
from stages.aggregation import updates as reading_updates
from stages.artefacts.sparse_files import Sparse, largest, parse_sparse, sparse_bytes
from stages.audit.audit import audit
from stages.audit.diff import diff
from stages.audit.verify import verify
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.evaluate import evaluate
from stages.exchange.pack import pack
from stages.exchange.unpack import unpack
from stages.federation.run import run
from stages.planning.comm_cost import comm_cost
from stages.planning.plan import plan
from stages.progress.status import status
from stages.runtime.errors import BadNumbers, Damaged, NotReady, Problem, Refused, UsageProblem
from stages.workspace.averaging import Aggregation
from stages.workspace.paths import Workspace

Once = Callable[[str, Callable[[Path], None]], Path]
NUMBERS, SHARE = 4 * 16 + 48 * 4, 0.1
KEPT = math.ceil(SHARE * NUMBERS)


def with_settings(folder: Path, lines: str = f"keep = {SHARE}") -> Path:
    edit(folder / "fedcollm.toml", "[distillation]", f"[aggregation]\n{lines}\n\n[distillation]")
    return folder


def flat(folder: Path) -> np.ndarray:
    """An adapter's numbers, by the names of its tensors."""
    found = safetensors.numpy.load((folder / "adapter_model.safetensors").read_bytes())
    return np.concatenate([found[name].ravel() for name in sorted(found)])


def sparse(folder: Path) -> Sparse:
    found = safetensors.numpy.load((folder / "sparse.safetensors").read_bytes())
    return Sparse(found["positions"], found["changes"])


@pytest.fixture(scope="session")
def ran_once(once: Once, base_models: Path) -> Path:
    """Three rounds of sparse updates, without scores; to be read only."""

    def fill(top: Path) -> None:
        folder = with_settings(make_workspace(top / "study", base_models))
        edit(folder / "fedcollm.toml", "rounds = 2", "rounds = 3")
        run(Workspace(folder), scores=False)

    return once("sparse", fill) / "study"


@pytest.fixture
def ran(ran_once: Path, tmp_path: Path) -> Path:
    """Such a workspace of one's own."""
    return shutil.copytree(ran_once, tmp_path / "study", symlinks=True)


@pytest.mark.parametrize("client", [1, 2, 3])
def test_the_largest_changes_are_sent_and_the_others_are_added_to_the_next(ran_once: Path, client: int) -> None:
    left = np.zeros(NUMBERS)
    for round in ("round-0001", "round-0002", "round-0003"):
        start = flat(ran_once / f"exchange/{round}/broadcast")
        change = flat(ran_once / f"private/client-{client}/{round}/slm").astype(np.float64) - start + left
        sent = sparse(ran_once / f"exchange/{round}/client-{client}")
        assert len(sent.positions) == KEPT
        assert np.all(np.diff(sent.positions.astype(int)) > 0)
        np.testing.assert_allclose(sent.changes, change[sent.positions], atol=1e-7)
        others = np.delete(change, sent.positions)
        assert np.abs(others).max() <= np.abs(sent.changes).min() + 1e-7
        left = change.copy()
        left[sent.positions] = 0
        kept = safetensors.numpy.load((ran_once / f"private/client-{client}/{round}/unsent.safetensors").read_bytes())
        np.testing.assert_allclose(kept["unsent"], left, atol=1e-7)
    assert np.abs(left).max() > 0


@pytest.mark.parametrize("round", [1, 2, 3])
def test_the_average_is_the_broadcast_with_the_mean_of_what_was_sent(ran_once: Path, round: int) -> None:
    start = flat(ran_once / f"exchange/round-000{round}/broadcast").astype(np.float64)
    for client in (1, 2, 3):
        sent = sparse(ran_once / f"exchange/round-000{round}/client-{client}")
        start[sent.positions] += sent.changes.astype(np.float64) / 3
    np.testing.assert_allclose(flat(ran_once / f"private/server/round-000{round}/aggregate"), start, atol=1e-7)


@pytest.mark.parametrize("rule", ['"median"', '"trimmed-mean"\noutliers = 1', '"geometric-median"', '"clipped-mean"'])
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_rules_read_sparse_updates_as_they_read_whole_ones(
    ran: Path, rule: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rule over adapters that were put together by hand."""
    from stages.aggregation.rules import combine

    monkeypatch.setattr(reading_updates, "BLOCK_BYTES", block)
    monkeypatch.setattr(reading_updates, "FEWEST_NUMBERS", 7)
    settings = {"rule": rule.split('"')[1]} | ({"outliers": 1} if "outliers" in rule else {})
    found = combine(Aggregation.model_validate(settings), updates_of(ran, SHARE), [1, 1, 1])[0]
    start = flat(ran / "exchange/round-0001/broadcast")
    for client in (1, 2, 3):
        place = ran / f"exchange/round-0001/client-{client}"
        whole, sent = start.copy(), sparse(place)
        whole[sent.positions] += sent.changes
        names = safetensors.numpy.load((ran / "exchange/round-0001/broadcast/adapter_model.safetensors").read_bytes())
        ends = np.cumsum([names[name].size for name in sorted(names)])[:-1]
        parts = zip(sorted(names), np.split(whole, ends), strict=True)
        content = safetensors.numpy.save({n: p.reshape(names[n].shape) for n, p in parts}, metadata={"format": "pt"})
        (place / "adapter_model.safetensors").write_bytes(content)
        (place / "sparse.safetensors").unlink()
        manifest = json.loads((place / "manifest.json").read_text())
        manifest["files"]["adapter_model.safetensors"] = manifest["files"].pop("sparse.safetensors")
        (place / "manifest.json").write_text(json.dumps(manifest))
        sign(place, parameters=NUMBERS)
    expected = combine(Aggregation.model_validate(settings), updates_of(ran, None), [1, 1, 1])[0]
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor)


def updates_of(folder: Path, keep: float | None) -> reading_updates.Updates:
    from stages.artefacts.adapter_files import read_adapter
    from stages.artefacts.reading import read_artefact
    from stages.runtime.events import ignore

    theta = read_artefact(folder / "exchange/round-0001/broadcast")
    heads = [read_artefact(folder / f"exchange/round-0001/client-{k}", only=["adapter_config.json"]) for k in (1, 2, 3)]
    lora = theta.manifest.lora
    return reading_updates.Updates(heads, read_adapter(theta, None, lora), ignore, keep)


def test_of_numbers_of_one_size_the_first_are_taken() -> None:
    found = largest(np.array([1, -3, 3, 0, -1, 3], np.float32), 2)
    assert found.positions.tolist() == [1, 2]
    assert found.changes.tolist() == [-3, 3]


def test_bytes_audit_verify_scores_and_parcels(ran: Path, tmp_path: Path) -> None:
    workspace = Workspace(ran)
    size = (ran / "exchange/round-0002/client-1/sparse.safetensors").stat().st_size
    cost = comm_cost(workspace).full
    assert cost is not None
    assert (cost.update_parameters, cost.update_bytes) == (KEPT, size)
    assert plan(workspace).sent["client"] == size < cost.adapter_bytes
    findings = audit([ran])
    assert {one.level for one in findings} <= {"OK", "SKIP"}
    assert any(one.id == "A6" and "sparse" in one.found for one in findings)
    assert {one.level for one in audit([ran / "exchange"])} <= {"OK", "SKIP"}
    verify(workspace)
    assert evaluate(workspace, round=3, client=2)["tasks"]["colours"]["questions"] == 12
    before = adapters(ran)
    bundle = pack(workspace, client=1, round=3, folder=tmp_path).path
    shutil.rmtree(ran / "exchange/round-0003/client-1")
    unpack(workspace, bundle)
    assert adapters(ran) == before


def test_what_was_lost_is_sent_again_byte_for_byte(ran: Path) -> None:
    before, workspace = adapters(ran), Workspace(ran)
    shutil.rmtree(ran / "exchange/round-0002/client-3")
    (ran / "private/client-3/round-0002/unsent.safetensors").unlink()
    client_train(workspace, client=3, round=2)
    assert adapters(ran) == before


def never(*_: object, **__: object) -> None:
    raise AssertionError("a model was loaded")


UNSENT = {
    "what round 1 left out, for round 2 to add, is not there": None,
    "does not hold the 256 numbers": sparse_bytes(Sparse(np.zeros(1, np.uint32), np.zeros(1, np.float32))),
    "does not hold the 256": safetensors.numpy.save({"unsent": np.zeros(NUMBERS, np.float32)}, metadata={"a": "b"}),
    "holds NaN or infinity": safetensors.numpy.save({"unsent": np.full(NUMBERS, np.nan, np.float32)}),
    "is not a safetensors file": b"",
}


@pytest.mark.parametrize("words", UNSENT)
def test_what_was_left_out_is_looked_at_before_training_and_made_again_as_told(
    ran: Path, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, workspace, place = adapters(ran), Workspace(ran), ran / "private/client-3/round-0001/unsent.safetensors"
    kept = place.read_bytes()
    place.unlink()
    if (content := UNSENT[words]) is not None:
        place.write_bytes(content)
    with monkeypatch.context() as patched:
        patched.setattr("stages.models.loading.Models.use", never)
        with pytest.raises((Damaged, NotReady), match=words) as raised:
            client_train(workspace, client=3, round=2, overwrite=True)
    assert raised.value.where == place
    assert "`fedcollm client-train --client 3 --round 1` makes it again" in str(raised.value.mend)
    client_train(workspace, client=3, round=1)
    assert place.read_bytes() == kept
    client_train(workspace, client=3, round=2, overwrite=True)
    assert adapters(ran) == before


def test_a_client_that_has_nothing_of_its_own_any_more_begins_anew(ran: Path) -> None:
    shutil.rmtree(ran / "private/client-3/round-0001")
    client_train(Workspace(ran), client=3, round=2, overwrite=True)
    assert (ran / "private/client-3/round-0002/unsent.safetensors").exists()


def test_a_change_beyond_float32_is_not_sent(ran: Path) -> None:
    place = ran / "private/client-3/round-0001/unsent.safetensors"
    largest_number = np.finfo(np.float32).max
    place.write_bytes(safetensors.numpy.save({"unsent": np.full(NUMBERS, largest_number, np.float32)}))
    own = ran / "private/client-3/round-0002/slm"
    found = safetensors.numpy.load((own / "adapter_model.safetensors").read_bytes())
    changed = safetensors.numpy.save(
        {name: np.full_like(one, 1e36) for name, one in found.items()}, metadata={"format": "pt"}
    )
    (own / "adapter_model.safetensors").write_bytes(changed)
    sign(own)
    before = adapters(ran)
    with pytest.raises(BadNumbers, match="beyond float32"):
        client_train(Workspace(ran), client=3, round=2)
    assert adapters(ran) == before


@pytest.mark.parametrize("lines", [f"keep = {SHARE}", 'combine = "freeze-a"', 'personal = "B"'])
def test_a_client_alone_is_told_to_whom_a_part_goes(workspace_folder: Path, lines: str) -> None:
    folder, notes = with_settings(workspace_folder, lines), list[str]()
    broadcast(Workspace(folder), round=1)
    shutil.rmtree(folder / "private/client-2")
    shutil.rmtree(folder / "private/server")
    client_train(Workspace(folder), client=1, round=1, report=lambda event: notes.append(event.text))
    assert any("goes to the server" in one and "pack --client 1 --round 1`" in one for one in notes)


# --- what is refused


def file(**changed: Any) -> bytes:
    arrays = {"positions": np.arange(KEPT, dtype=np.uint32), "changes": np.ones(KEPT, np.float32)} | changed
    return safetensors.numpy.save({name: array for name, array in arrays.items() if array is not None})


POSITIONS = np.arange(KEPT, dtype=np.uint32)
BAD = {
    "names a position twice": file(positions=np.maximum(POSITIONS, 1)),
    "names positions out of order": file(positions=POSITIONS[::-1].copy()),
    "names position 256 of 256": file(positions=np.append(POSITIONS[:-1], NUMBERS).astype(np.uint32)),
    f"has {KEPT - 1} numbers; of {NUMBERS} {KEPT} are sent": file(
        positions=POSITIONS[:-1], changes=np.ones(KEPT - 1, np.float32)
    ),
    "is no sparse update": file(changes=np.ones(KEPT + 1, np.float32)),
    "is no sparse update: it": file(changes=np.ones(KEPT, np.float64)),
    "is no sparse": file(more=np.ones(1, np.float32)),
    "no sparse update": file(changes=None),
    "is a pickle": b"\x80\x04pickle",
    "holds NaN": file(changes=np.full(KEPT, np.nan, np.float32)),
    "carries metadata": safetensors.numpy.save(
        {"positions": POSITIONS, "changes": np.ones(KEPT, np.float32)}, metadata={"who": "me"}
    ),
}


@pytest.mark.parametrize("words", BAD)
def test_a_file_that_is_not_as_agreed_is_refused_by_name(ran: Path, words: str) -> None:
    shutil.rmtree(ran / "private/server/round-0001")
    place = ran / "exchange/round-0001/client-2"
    (place / "sparse.safetensors").write_bytes(BAD[words])
    sign(place)
    with pytest.raises((Damaged, BadNumbers), match=words) as raised:
        aggregate(Workspace(ran), round=1)
    assert "client-2" in str(raised.value.where)
    assert not (ran / "private/server/round-0001/aggregate").exists()
    is_of_its_form = words.startswith("names position 256")  # which only who knows the adapter can tell
    assert any(one.id == "A3" and one.level == "FAIL" for one in audit([ran])) != is_of_its_form


def test_sound_files_are_read() -> None:
    assert parse_sparse(file(), Path("x")).changes.tolist() == [1.0] * KEPT


def test_a_whole_update_is_refused_where_few_numbers_are_agreed(ran: Path) -> None:
    shutil.rmtree(ran / "private/server/round-0001")
    place = ran / "exchange/round-0001/client-2"
    shutil.rmtree(place)
    shutil.copytree(ran / "private/client-2/round-0001/slm", place)
    with pytest.raises(Refused, match=r"client 2's update is whole, the agreement has keep = 0\.1"):
        aggregate(Workspace(ran), round=1)


def test_a_sparse_update_is_refused_where_all_numbers_are_agreed(finished: Path, ran_once: Path) -> None:
    shutil.rmtree(finished / "private/server/round-0001")
    place = finished / "exchange/round-0001/client-2"
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "adapter_model.safetensors").unlink()
    shutil.copy(ran_once / "exchange/round-0001/client-2/sparse.safetensors", place)
    manifest["files"]["sparse.safetensors"] = manifest["files"].pop("adapter_model.safetensors")
    (place / "manifest.json").write_text(json.dumps(manifest))
    sign(place)
    with pytest.raises(Refused, match="client 2's update is sparse, the agreement has no keep"):
        aggregate(Workspace(finished), round=1)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("keep = 0.5", "less than 0.5"),
        ("keep = 0.0", "greater than 0"),
        ('keep = 0.1\nmode = "secure"', "mode secure adds the same ones"),
    ],
)
def test_settings_that_do_not_fit(workspace_folder: Path, lines: str, words: str) -> None:
    with pytest.raises(Problem, match=words):
        _ = Workspace(with_settings(workspace_folder, lines)).agreement


def test_ranks_by_client_are_not_for_sparse_updates(workspace_folder: Path) -> None:
    toml = with_settings(workspace_folder, 'keep = 0.1\ncombine = "product"') / "fedcollm.toml"
    toml.write_text(toml.read_text() + "\n[clients.2]\nrank = 2\n")
    with pytest.raises(Problem, match="begin with other adapters"):
        _ = Workspace(workspace_folder).agreement


def test_a_part_of_an_adapter_can_be_sparse_too(workspace_folder: Path) -> None:
    folder = with_settings(workspace_folder, 'keep = 0.25\ncombine = "freeze-a"')
    edit(folder / "fedcollm.toml", "rounds = 2", "rounds = 1")
    run(Workspace(folder), scores=False)
    assert len(sparse(folder / "exchange/round-0001/client-1").positions) == 48 * 4 / 4
    start, average = (
        safetensors.numpy.load((folder / f"{place}/adapter_model.safetensors").read_bytes())
        for place in ("exchange/round-0001/broadcast", "private/server/round-0001/aggregate")
    )
    assert all(np.array_equal(start[name], average[name]) == (".lora_A." in name) for name in start)
    assert {one.level for one in audit([folder])} <= {"OK", "SKIP"}


def test_what_a_turn_of_a_or_b_left_out_waits_for_its_next_turn(workspace_folder: Path) -> None:
    folder = with_settings(workspace_folder, 'keep = 0.25\ncombine = "alternate"')
    edit(folder / "fedcollm.toml", "rounds = 2", "rounds = 3")
    run(Workspace(folder), scores=False)
    place = folder / "private/client-1"
    before, _, after = (
        safetensors.numpy.load((place / f"round-000{round}/unsent.safetensors").read_bytes())["unsent"]
        for round in (1, 2, 3)
    )
    start, trained = (
        next(one for name, one in safetensors.numpy.load(path.read_bytes()).items() if ".lora_B." in name).ravel()
        for path in (
            folder / "exchange/round-0003/broadcast/adapter_model.safetensors",
            place / "round-0003/slm/adapter_model.safetensors",
        )
    )
    change = trained - start + before
    sent = sparse(folder / "exchange/round-0003/client-1")
    np.testing.assert_allclose(sent.changes, change[sent.positions], atol=1e-7)
    change[sent.positions] = 0
    np.testing.assert_allclose(after, change, atol=1e-7)
    assert {one.level for one in audit([folder])} <= {"OK", "SKIP"}
    turns = [one for one in audit([folder]) if one.id == "A5"]
    said = r"cosine to the update before that trained the same matrices -?0\.\d\d, norm ratio .*"
    assert [one.where for one in turns if re.fullmatch(said, one.found)] == ["round 0003"]
    assert turns[0].measured["cosine"] != 0, "B against A has nothing in common"


@pytest.mark.parametrize("rule", ["median", "mean"])
def test_a_change_that_leaves_float32_at_the_server_is_named(ran: Path, rule: str) -> None:
    from stages.aggregation.rules import combine

    start, place = ran / "exchange/round-0001/broadcast", ran / "exchange/round-0001/client-2"
    found = safetensors.numpy.load((start / "adapter_model.safetensors").read_bytes())
    large = {name: np.full_like(one, 3e38) for name, one in found.items()}
    (start / "adapter_model.safetensors").write_bytes(safetensors.numpy.save(large, metadata={"format": "pt"}))
    sign(start)
    (place / "sparse.safetensors").write_bytes(file(changes=np.full(KEPT, 3e38, np.float32)))
    sign(place)
    with pytest.raises(BadNumbers, match="holds NaN or infinity") as raised:
        combine(Aggregation.model_validate({"rule": rule}), updates_of(ran, SHARE), [1, 1, 1])
    assert raised.value.where == place / "sparse.safetensors"


def test_an_update_that_names_more_than_the_broadcast_is_refused_in_those_words(ran: Path) -> None:
    shutil.rmtree(ran / "private/server/round-0001")
    place = ran / "exchange/round-0001/client-2"
    parents = json.loads((place / "manifest.json").read_text())["parents"]
    sign(place, parents=parents | {"slm-0001": "0" * 64})
    with pytest.raises(Refused, match="was made from slm-0001 too, not from the broadcast alone"):
        aggregate(Workspace(ran), round=1)


def test_the_audit_counts_the_numbers_of_a_sparse_update(ran: Path) -> None:
    sign(ran / "exchange/round-0003/client-2", parameters=10**15)
    told = [one for one in audit([ran]) if one.id == "A3" and one.level == "FAIL"]
    assert [(one.found, one.expected) for one in told] == [(f"holds {KEPT} numbers", f"{10**15}, by its manifest")]


def test_diff_says_that_a_sparse_update_is_no_adapter(ran_once: Path) -> None:
    with pytest.raises(UsageProblem, match=r"this update is sparse, by aggregation\.keep") as raised:
        diff(ran_once / "exchange/round-0001/broadcast", ran_once / "exchange/round-0001/client-1")
    assert "private/client-k/round-t/slm" in str(raised.value.mend)


@pytest.mark.parametrize("rule", ["median", "mean"])
def test_the_server_warns_where_a_rule_ignores_what_few_clients_send(workspace_folder: Path, rule: str) -> None:
    folder, told = with_settings(workspace_folder, f'keep = {SHARE}\nrule = "{rule}"'), list[str]()
    broadcast(Workspace(folder), round=1)
    for client in (1, 2, 3):
        client_train(Workspace(folder), client=client, round=1)
    aggregate(Workspace(folder), round=1, report=lambda event: told.append(event.text))
    assert any("one that few clients send stays as it is" in one for one in told) == (rule == "median")


def test_what_is_sent_is_as_short_as_agreed_with_what_was_left_out_before(workspace_folder: Path) -> None:
    folder = with_settings(workspace_folder, f"keep = {SHARE}\nmax_update_norm = 0.05")
    edit(folder / "fedcollm.toml", "rounds = 2", "rounds = 5")
    run(Workspace(folder), scores=False)
    lengths, left = list[float](), np.zeros(NUMBERS)
    for round in range(1, 6):
        start = flat(folder / f"exchange/round-000{round}/broadcast")
        left += flat(folder / f"private/client-1/round-000{round}/slm").astype(np.float64) - start
        sent = sparse(folder / f"exchange/round-000{round}/client-1")
        left[sent.positions] -= sent.changes
        lengths.append(float(np.linalg.norm(sent.changes)))
        kept = safetensors.numpy.load((folder / f"private/client-1/round-000{round}/unsent.safetensors").read_bytes())
        np.testing.assert_allclose(kept["unsent"], left, atol=1e-7)
    assert max(lengths) == pytest.approx(0.05, rel=1e-5)
    assert lengths[0] < 0.04 < min(lengths[3:])


def test_how_much_was_left_out_is_counted_and_not_believed(ran: Path) -> None:
    sign(ran / "exchange/round-0002/broadcast", parameters=2**53 - 1)
    shutil.rmtree(ran / "private/client-3/round-0002")
    client_train(Workspace(ran), client=3, round=2, overwrite=True)
    assert len(sparse(ran / "exchange/round-0002/client-3").positions) == KEPT


def test_verify_says_that_it_does_not_look_at_what_was_left_out(ran: Path) -> None:
    place = ran / "private/client-1/round-0001/unsent.safetensors"
    place.write_bytes(place.read_bytes()[:-1] + b"x")
    found = status(Workspace(ran), verify=True)
    assert not found.is_damaged
    assert "unsent.safetensors" in found.not_covered
