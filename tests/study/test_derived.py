"""Derived workspaces: the parent's text with a few keys changed, on the parent's models, tasks and rows."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from builders import Outcome, adapters, edit, rows, write_rows
from stages.artefacts.reading import read_manifest
from stages.data.prepare import prepare
from stages.federation.compare import run_all
from stages.federation.run import derived, run
from stages.runtime.errors import NotReady, Refused, UsageProblem
from stages.study import variants
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace


def changed_lines(parent: Path, child: Path) -> list[str]:
    """What `diff` shows of two fedcollm.toml, without the comment that says where the second comes from."""
    before, after = (
        [line for line in (folder / "fedcollm.toml").read_text().splitlines() if variants.DERIVED.strip() != line]
        for folder in (parent, child)
    )
    found = difflib.unified_diff(before, after, n=0, lineterm="")
    return sorted(line for line in found if line[0] in "+-" and line[:3] not in ("+++", "---"))


def make(folder: Path, name: str, changes: dict[str, Any], **options: Any) -> Workspace:
    parent = Workspace(folder)
    return derived(parent, folder / name, changes, made_by=Command("run", method="fedavg"), **options)


def test_the_template_with_all_its_comments_differs_in_the_changed_keys_alone(
    tmp_path: Path, fedcollm: Callable[..., Outcome]
) -> None:
    study = tmp_path / "study"
    assert fedcollm("init", study, "--template", "s1").code == 0
    changes = {"federation.seed": 5, "distillation.lambda_slm": 0.25, "aggregation.min_clients": 3}
    child = make(study, "sweeps/x", changes)
    added = [line for line in changed_lines(study, child.root) if line.startswith("+")]
    assert [line.split("#")[0].strip() for line in added] == ["+lambda_slm = 0.25", "+min_clients = 3", "+seed = 5"]
    kept = (study / "fedcollm.toml").read_text().count("#")
    assert child.root.joinpath("fedcollm.toml").read_text().count("#") >= kept
    assert child.agreement.federation.seed == 5
    assert child.agreement.distillation.lambda_slm == 0.25


@pytest.mark.parametrize(
    ("place", "lines"),
    [
        ("baselines/fedavg", ['+method = "fedavg"']),
        ("baselines/standalone", ['+method = "standalone"']),
        ("baselines/fedavg-aux", ["+lambda_llm = 0.0", "+lambda_slm = 0.0", '+method = "fedavg-aux"']),
        ("seeds/seed-8", ["+seed = 8", "-seed = 7"]),
    ],
)
def test_a_derived_agreement_differs_in_the_keys_that_make_it_another(
    place: str, lines: list[str], studied_once: Path
) -> None:
    assert changed_lines(studied_once, studied_once / place) == lines


def test_a_workspace_derived_of_a_derived_one_has_the_changes_of_both(studied_once: Path) -> None:
    grandchild = studied_once / "seeds/seed-8/baselines/fedavg"
    assert changed_lines(studied_once, grandchild) == ['+method = "fedavg"', "+seed = 8", "-seed = 7"]
    workspace = Workspace(grandchild)
    assert workspace.home == studied_once
    assert workspace.local("models/slm") == studied_once / "models/slm"
    assert workspace.tasks == studied_once / "tasks"


@pytest.mark.parametrize("place", ["baselines/fedavg", "seeds/seed-8", "seeds/seed-8/baselines/standalone"])
def test_rows_are_shared_without_a_second_copy(place: str, studied_once: Path) -> None:
    for name in ("private/client-1/train.jsonl", "private/client-2/train.jsonl", "private/server/auxiliary.jsonl"):
        assert (studied_once / place / name).samefile(studied_once / name)


def test_held_out_rows_are_shared_and_trained_on_by_no_method(workspace_folder: Path) -> None:
    unlike_others = [{"prompt": f"held out {i}", "completion": " red"} for i in range(5)]
    held_out = write_rows(workspace_folder / "private/server/held-out.jsonl", unlike_others)
    workspace = Workspace(workspace_folder)
    for method in ("fedavg", "centralized"):
        folder, changes = variants.baseline(workspace, method)
        variant = variants.make_variant(workspace, folder, changes, made_by=Command("run"))
        if method == "fedavg":
            assert variant.held_out_data.samefile(held_out)
        else:
            assert not variant.held_out_data.exists()
            pooled = variant.client_data(1).read_text()
            assert not any(line in pooled for line in held_out.read_text().splitlines())


def test_base_models_are_loaded_once_for_all_methods_and_seeds(studied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = AutoModelForCausalLM.from_pretrained

    def counted(folder: Path, **options: Any) -> Any:
        loaded.append(folder.name)
        return load(folder, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    for seed in ("", "seeds/seed-8"):
        for made in ("standalone/exchange/round-0002", "centralized/exchange/round-0002", "fedavg-aux/results"):
            shutil.rmtree(studied / seed / "baselines" / made)
    run_all(Workspace(studied), seeds=[7, 8], methods=["standalone", "centralized", "fedavg-aux"])
    assert sorted(loaded) == ["llm", "slm"]


def test_a_centralized_slm_is_the_llm_and_leaves_the_real_one_untouched(studied_once: Path) -> None:
    workspace = Workspace(studied_once / "baselines/centralized")
    manifest, _ = read_manifest(workspace.client_update(2, 1))
    llm, _ = read_manifest(Workspace(studied_once).llm(2))
    slm, _ = read_manifest(Workspace(studied_once).slm(2))
    assert manifest.base == llm.base != slm.base


def test_the_parents_edit_is_refused_until_it_is_undone_or_overwritten(
    studied: Path, fedcollm: Callable[..., Outcome]
) -> None:
    before = adapters(studied)
    edit(studied / "fedcollm.toml", 'name = "tiny"', 'name = "tinier"')
    outcome = fedcollm("run", "--method", "fedavg", "-w", studied)
    assert outcome.code == 5
    assert "baselines/fedavg is of another agreement than fedcollm.toml is now" in outcome.err
    assert "mend  undo the edit of fedcollm.toml, or fedcollm run --method fedavg --overwrite" in outcome.err
    edit(studied / "fedcollm.toml", 'name = "tinier"', 'name = "tiny"')
    assert fedcollm("run", "--method", "fedavg", "-w", studied).code == 0
    assert adapters(studied) == before
    edit(studied / "fedcollm.toml", 'name = "tiny"', 'name = "tinier"')
    assert fedcollm("run", "--method", "fedavg", "--overwrite", "-w", studied).code == 0
    workspace = Workspace(studied / "baselines/fedavg")
    assert workspace.agreement.federation.name == "tinier"
    assert read_manifest(workspace.aggregate(2))[0].agreement_sha256 == workspace.agreement_sha256


def test_a_setting_that_changes_no_agreement_is_taken_over_from_the_parents_machine(studied: Path) -> None:
    (studied / "machine.toml").write_text("micro_batch = 2 # this machine is small\n")
    variants.make_variant(
        Workspace(studied), *variants.baseline(Workspace(studied), "fedavg"), made_by=Command("run", method="fedavg")
    )
    workspace = Workspace(studied / "baselines/fedavg")
    assert workspace.machine.micro_batch == 2
    assert "# this machine is small" in (workspace.root / "machine.toml").read_text()
    assert workspace.home == studied


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
def test_models_that_this_machine_keeps_elsewhere_are_found_by_every_method(
    relative: bool, workspace_folder: Path, base_models: Path
) -> None:
    elsewhere = workspace_folder / "elsewhere"
    shutil.copytree(base_models, elsewhere)
    (workspace_folder / "models").unlink()
    place = "elsewhere" if relative else str(elsewhere)
    (workspace_folder / "machine.toml").write_text(f'[models]\nslm = "{place}/slm"\nllm = "{place}/llm"\n')
    toml = workspace_folder / "fedcollm.toml"
    toml.write_text(toml.read_text().replace("models/", "nobody/").replace("rounds = 2", "rounds = 1"))
    root = Workspace(workspace_folder)
    run(root, scores=False)
    for method in ("fedavg", "centralized"):
        run(root, method=method, scores=False)
    own = read_manifest(root.llm(1))[0].base
    assert read_manifest(Workspace(root.baseline("centralized")).client_update(1, 1))[0].base == own
    assert read_manifest(Workspace(root.baseline("fedavg")).client_update(1, 1))[0].base != own


def test_an_override_of_the_slm_alone_is_not_taken_for_the_llm(workspace_folder: Path, base_models: Path) -> None:
    (workspace_folder / "machine.toml").write_text(f'[models]\nslm = "{base_models}/slm"\n')
    run(Workspace(workspace_folder), method="centralized", rounds=range(1, 2), scores=False)
    central = Workspace(workspace_folder / "baselines/centralized")
    assert central.machine.models.slm is None
    run(Workspace(workspace_folder), rounds=range(1, 2), scores=False)
    bases = [read_manifest(path)[0].base for path in (central.client_update(1, 1), Workspace(workspace_folder).llm(1))]
    assert bases[0] == bases[1]


# --- data dealt by prepare


@pytest.fixture
def dealt(workspace_folder: Path) -> Path:
    """A workspace whose rows `prepare` dealt from a file named relative to it."""
    shutil.rmtree(workspace_folder / "private")
    write_rows(workspace_folder / "data/all.jsonl", rows(40))
    toml = workspace_folder / "fedcollm.toml"
    toml.write_text(toml.read_text() + '\n[data]\nfiles = ["data/all.jsonl"]\n')
    prepare(Workspace(workspace_folder))
    return workspace_folder


def parties(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.glob("private/*/*.jsonl")}


@pytest.mark.parametrize(
    "changes",
    [{"federation.seed": 8}, {"federation.clients": 2}, {"data.auxiliary_share": 0.5}],
    ids=["seed", "clients", "data"],
)
def test_rows_are_dealt_anew_where_a_setting_of_the_deal_changes(changes: dict[str, Any], dealt: Path) -> None:
    child = make(dealt, "sweeps/x", changes)
    assert parties(child.root).keys() == {f"client-{k}" for k in child.clients} | {"server"}
    assert parties(child.root) != parties(dealt)
    # As prepare itself would deal them under that agreement.
    by_hand = shutil.copytree(dealt, dealt.parent / "by hand", symlinks=True)
    shutil.rmtree(by_hand / "private")
    shutil.copy(child.root / "fedcollm.toml", by_hand)
    prepare(Workspace(by_hand))
    assert parties(by_hand) == parties(child.root)
    assert make(dealt, "sweeps/x", changes).root == child.root  # and again


@pytest.mark.parametrize(
    "changes", [{"distillation.lambda_slm": 0.5}, {"federation.rounds": 1}, {"client_training.learning_rate": 0.1}]
)
def test_rows_are_shared_where_the_deal_is_the_same(changes: dict[str, Any], dealt: Path) -> None:
    child = make(dealt, "sweeps/x", changes)
    assert parties(child.root) == parties(dealt)
    assert child.split.samefile(Workspace(dealt).split)


@pytest.mark.parametrize(("method", "kept"), [("fedavg", 0.5), ("standalone", None), ("centralized", None)])
def test_only_what_is_averaged_stays_near_a_broadcast(method: Any, kept: float | None, workspace_folder: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", "[client_training]", "[client_training]\nproximal = 0.5")
    root = Workspace(workspace_folder)
    child = make(workspace_folder, f"baselines/{method}", dict(variants.baseline(root, method)[1]))
    assert child.agreement.client_training.proximal == kept


@pytest.mark.parametrize(
    ("method", "kept"),
    [("fedavg", "fedadam"), ("fedavg-aux", "fedadam"), ("standalone", "none"), ("centralized", "none")],
)
def test_only_what_is_averaged_has_an_optimiser_at_the_server(method: Any, kept: str, workspace_folder: Path) -> None:
    lines = '[aggregation]\nserver = "fedadam"\nbeta_1 = 0.5\n\n[distillation]'
    edit(workspace_folder / "fedcollm.toml", "[distillation]", lines)
    root = Workspace(workspace_folder)
    child = make(workspace_folder, f"baselines/{method}", dict(variants.baseline(root, method)[1]))
    assert (child.agreement.aggregation.server, child.agreement.aggregation.beta_1) == (
        kept,
        0.5 if kept == "fedadam" else None,
    )


@pytest.mark.parametrize("method", ["fedavg", "standalone", "centralized"])
def test_every_method_trains_clients_under_the_attack_that_is_agreed(method: Any, workspace_folder: Path) -> None:
    attack = "[client_training.adversarial]\nradius = 0.1\nsteps = 2\n"
    edit(workspace_folder / "fedcollm.toml", "[distillation]", f"{attack}\n[distillation]")
    root = Workspace(workspace_folder)
    child = make(workspace_folder, f"baselines/{method}", dict(variants.baseline(root, method)[1]))
    assert child.agreement.client_training.adversarial == root.agreement.client_training.adversarial
    assert child.agreement.client_training.steps
    point = make(workspace_folder, "sweeps/x", {"client_training.adversarial.radius": 0.3, "client_training.steps": 9})
    training = point.agreement.client_training
    assert (training.adversarial.radius, training.adversarial.steps, training.steps) == (0.3, 2, 9)


def test_a_method_never_deals_anew_even_if_it_changes_the_number_of_clients(dealt: Path) -> None:
    root = Workspace(dealt)
    child = make(dealt, "baselines/centralized", dict(variants.baseline(root, "centralized")[1]))
    assert sorted(parties(child.root)["client-1"].splitlines()) == sorted(
        b"".join(parties(dealt).values()).splitlines()
    )


def test_rows_that_came_from_the_parties_themselves_are_never_dealt(workspace_folder: Path) -> None:
    child = make(workspace_folder, "seeds/seed-9", {"federation.seed": 9})
    assert parties(child.root) == parties(workspace_folder)


# --- what is refused


def test_settings_that_make_no_agreement_are_refused_before_anything_is_written(workspace_folder: Path) -> None:
    for changes, message in (
        ({"federation.clients": 0}, "federation.clients"),
        ({"federation.seeds": 1}, "federation.seeds: unknown key; did you mean seed?"),
        ({"federation.seed.x": 1}, "there is no setting federation.seed.x"),
        ({"federation.method": "fedavg-aux"}, "method fedavg-aux has no distillation"),
    ):
        with pytest.raises(UsageProblem, match=message.replace("?", r"\?")):
            make(workspace_folder, "sweeps/x", changes)
    assert not (workspace_folder / "sweeps").exists()


def test_one_that_is_not_there_is_not_ready_and_one_of_other_settings_refused(workspace_folder: Path) -> None:
    parent, folder = Workspace(workspace_folder), workspace_folder / "sweeps/x"
    with pytest.raises(NotReady, match="sweeps/x is not there") as absent:
        variants.open_variant(parent, folder, {"federation.seed": 9}, made_by=Command("run", method="fedavg"))
    assert absent.value.mend == "fedcollm run --method fedavg"
    make(workspace_folder, "sweeps/x", {"federation.seed": 9})
    with pytest.raises(Refused, match="sweeps/x is of another agreement") as other:
        make(workspace_folder, "sweeps/x", {"federation.seed": 10})
    assert str(other.value.mend).endswith("or fedcollm run --method fedavg --overwrite")
    assert make(workspace_folder, "sweeps/x", {"federation.seed": 10}, overwrite=True).agreement.federation.seed == 10


def test_the_same_settings_in_another_order_are_the_same_agreement(workspace_folder: Path) -> None:
    child = make(workspace_folder, "sweeps/x", {"distillation.lambda_slm": 0.5})
    toml = child.root / "fedcollm.toml"
    edit(toml, "clients = 3\nrounds = 2", "rounds = 2\nclients = 3")
    before = toml.read_bytes()
    assert make(workspace_folder, "sweeps/x", {"distillation.lambda_slm": 0.5}).root == child.root
    assert toml.read_bytes() == before, "its digest stands in manifests"


def test_centralized_takes_rows_as_long_as_any_party_may(workspace_folder: Path) -> None:
    toml = workspace_folder / "fedcollm.toml"
    edit(toml, "[distillation]\n", "[distillation]\nmax_length = 20\n")
    _, changes = variants.baseline(Workspace(workspace_folder), "centralized")
    assert changes["client_training.max_length"] == 512


def test_where_long_rows_are_skipped_centralized_takes_the_steps_that_co_distill_took(workspace_folder: Path) -> None:
    toml = workspace_folder / "fedcollm.toml"
    edit(toml, "steps = 5", "epochs = 1.0")
    toml.write_text(toml.read_text() + '\n[data]\ntoo_long = "skip"\n')
    long = {"prompt": "Q : " + "the " * 60 + "A :", "completion": " red"}
    write_rows(workspace_folder / "private/server/auxiliary.jsonl", [*rows(12), *(long | {} for _ in range(8))])
    workspace = Workspace(workspace_folder)
    with pytest.raises(NotReady):
        variants.baseline(workspace, "centralized")
    run(workspace, scores=False)
    # 12 of the 20 rows fit, 4 to a step
    assert variants.baseline(workspace, "centralized")[1]["client_training.steps"] == 3


def test_rows_behind_a_link_are_the_derived_workspaces_too(workspace_folder: Path) -> None:
    place = workspace_folder / "private/client-2/train.jsonl"
    place.rename(workspace_folder.parent / "scratch.jsonl")
    place.symlink_to("../../../scratch.jsonl")
    child = make(workspace_folder, "seeds/seed-8", {"federation.seed": 8})
    assert child.client_data(2).read_bytes() == place.read_bytes()
