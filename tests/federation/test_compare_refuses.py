"""compare refuses what cannot be compared, and the command that it names mends it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import Outcome, edit, make_study, rewrite, rows, write_rows
from stages.federation.run import run
from stages.runtime.errors import Refused
from stages.study.budgets import spent
from stages.study.scores import check_tasks
from stages.workspace.paths import Workspace


@pytest.fixture
def refuses(studied: Path, fedcollm: Callable[..., Outcome]) -> Callable[..., str]:
    """refuses(code, mend, words...): compare fails with that code, and the mend is a command that works."""

    def call(code: int, mend: str, *words: str) -> str:
        outcome = fedcollm("compare", *words, "-w", studied)
        assert outcome.code == code, outcome.err
        assert f"  mend  {mend}" in outcome.err, outcome.err
        assert outcome.out == ""
        return outcome.err

    return call


def give(folder: Path, command: str, fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    outcome = fedcollm(*command.split()[1:])
    assert outcome.code == 0, outcome.err
    outcome = fedcollm("compare")
    assert outcome.code == 0, outcome.err


def test_seeds_that_have_not_been_run_are_named(refuses: Callable[..., str]) -> None:
    said = refuses(3, "fedcollm compare --seeds 7,9", "--seeds", "7,9", "--collect")
    assert "seeds/seed-9 is not there" in said


def test_a_method_that_has_not_been_run_is_named(
    studied: Path, refuses: Callable[..., str], fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(studied / "seeds/seed-8/baselines/standalone")
    mend = "fedcollm run --method standalone --workspace seeds/seed-8"
    assert "baselines/standalone is not there" in refuses(3, mend)
    give(studied, mend, fedcollm, monkeypatch)


@pytest.mark.parametrize(
    ("home", "gone"),
    [
        ("", "private/server/round-0002"),
        ("baselines/fedavg", "private/server/round-0002"),
        ("baselines/fedavg-aux", "private/server/round-0002"),
        ("baselines/standalone", "exchange/round-0002/client-2"),
        ("seeds/seed-8/baselines/centralized", "exchange/round-0002"),
    ],
)
def test_a_half_finished_federation_is_gone_on_with(
    home: str,
    gone: str,
    studied: Path,
    refuses: Callable[..., str],
    fedcollm: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.rmtree(studied / home / gone)
    mend = "fedcollm run" + (f" --workspace {home}" if home else "")
    assert "a federation is not finished: " in refuses(3, mend)
    give(studied, mend, fedcollm, monkeypatch)


def test_a_party_alone_is_told_that_it_has_nothing_to_compare(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    for party in ("client-1", "client-3", "server"):
        shutil.rmtree(finished / "private" / party)
    outcome = fedcollm("compare", "-w", finished)
    assert outcome.code == 3
    mend = "a party alone: `fedcollm evaluate --client 2 --round 2`"
    assert f"compare needs the models of all parties in one workspace; {mend}" in " ".join(outcome.err.split())


def test_a_client_that_missed_a_round_makes_budgets_differ(
    tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_study(tmp_path / "study", base_models)
    toml = folder / "fedcollm.toml"
    toml.write_text(toml.read_text() + "\n[aggregation]\nmin_clients = 1\n")
    run(Workspace(folder))
    data = folder / "private/client-2/train.jsonl"
    kept = data.rename(tmp_path / "kept")
    run(Workspace(folder), method="fedavg", rounds=range(1, 2))
    shutil.copy(kept, data)
    # Client 2 is back in round 2, which goes on from an average that did without it.
    run(Workspace(folder), method="fedavg")
    outcome = fedcollm("compare", "-w", folder)
    assert outcome.code == 6
    assert "fedavg gave client-2 2 steps, 8 examples, 8 tokens; fedcollm gave it 4 steps, 16 examples" in outcome.err
    mend = "fedcollm run --workspace baselines/fedavg --overwrite"
    assert f"  mend  {mend}; or leave one of them out with --methods" in outcome.err
    assert fedcollm("compare", "--methods", "fedcollm", "-w", folder).code == 0
    give(folder, mend, fedcollm, monkeypatch)
    ledger = spent(Workspace(folder / "baselines/fedavg"))
    assert ledger == {party: done for party, done in spent(Workspace(folder)).items() if party != "server"}


def test_an_llm_that_was_trained_longer_is_not_compared(studied: Path, refuses: Callable[..., str]) -> None:
    for round in (1, 2):
        path = studied / f"baselines/fedavg-aux/private/server/round-{round:04d}/llm/manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": 9, "examples": 36}))
    said = refuses(6, "fedcollm run --overwrite; or leave one of them out with --methods")
    assert "budgets differ: fedavg-aux gave the LLM 18 steps, 72 examples" in said


def test_an_agreement_that_was_edited_since_is_refused_until_it_is_undone(
    studied: Path, refuses: Callable[..., str], fedcollm: Callable[..., Outcome]
) -> None:
    edit(studied / "fedcollm.toml", 'name = "tiny"', 'name = "tinier"')
    either = "undo the edit of fedcollm.toml, or "
    refuses(5, f"{either}fedcollm run --method fedavg --overwrite")
    refuses(5, f"{either}fedcollm compare --seeds 8 --overwrite", "--seeds", "8", "--collect")
    edit(studied / "fedcollm.toml", 'name = "tinier"', 'name = "tiny"')
    assert fedcollm("compare", "-w", studied).code == 0


def test_an_agreement_that_was_edited_since_is_run_anew_with_overwrite(
    studied: Path, fedcollm: Callable[..., Outcome]
) -> None:
    edit(studied / "fedcollm.toml", "learning_rate = 0.3\n\n[dist", "learning_rate = 0.4\n\n[dist")
    words = ("compare", "--seeds", "7,8", "--methods", "fedcollm,standalone", "--json", "-w", studied)
    assert fedcollm(*words).code == 5
    outcome = fedcollm(*words, "--overwrite")
    assert outcome.code == 0, outcome.err
    assert Workspace(studied / "seeds/seed-8/baselines/standalone").agreement.client_training.learning_rate == 0.4
    assert json.loads(fedcollm(*words, "--collect").out) == json.loads(outcome.out)


@pytest.mark.parametrize("words", [(), ("--seeds", "7", "--collect")])
def test_overwrite_without_anything_to_run_is_refused(
    words: tuple[str, ...], studied_once: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm("compare", *words, "--overwrite", "-w", studied_once)
    assert outcome.code == 2
    assert "mend  fedcollm compare --seeds 1,2,3 --overwrite" in outcome.err


def test_several_results_that_are_not_there_are_told_at_once_with_one_command(
    studied: Path, refuses: Callable[..., str], fedcollm: Callable[..., Outcome]
) -> None:
    for client in (1, 2):
        (studied / f"results/round-0002/client-{client}.json").unlink()
    mend = "fedcollm compare --seeds 7 --methods fedcollm,fedavg, which runs what is missing"
    said = refuses(3, mend, "--seeds", 7, "--methods", "fedavg,fedcollm", "--collect")
    assert "2 results are not there, the first results/round-0002/client-1.json" in said
    assert fedcollm("compare", "--seeds", 7, "--methods", "fedcollm,fedavg", "-w", studied).code == 0


def test_a_result_of_another_agreement_is_refused(studied: Path, refuses: Callable[..., str]) -> None:
    path = studied / "baselines/standalone/results/round-0002/client-2.json"
    rewrite(path, json.loads(path.read_text()) | {"agreement_sha256": "0" * 64})
    mend = "undo the edit of fedcollm.toml, or fedcollm run --workspace baselines/standalone --overwrite"
    assert f"{path.relative_to(studied)} is a result of another agreement" in refuses(5, mend)


def test_a_result_of_an_adapter_that_was_made_again_is_refused(
    studied: Path, refuses: Callable[..., str], fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = studied / "baselines/fedavg/private/server/round-0002/aggregate/manifest.json"
    place.write_text(place.read_text() + "\n")
    mend = "fedcollm evaluate --round 2 --model aggregate --workspace baselines/fedavg"
    assert "is of another adapter than baselines/fedavg/private/server/round-0002/aggregate is now" in refuses(5, mend)
    give(studied, mend, fedcollm, monkeypatch)


def test_a_result_of_an_earlier_version_is_made_again(
    studied: Path, refuses: Callable[..., str], fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = studied / "baselines/fedavg/results/round-0002/client-1.json"
    value = json.loads(path.read_text())
    del value["tasks"]["colours"]["correct"]
    rewrite(path, value)
    mend = "fedcollm evaluate --round 2 --client 1 --workspace baselines/fedavg --overwrite"
    assert "does not say which questions were right" in refuses(5, mend)
    give(studied, mend, fedcollm, monkeypatch)


def test_a_result_of_other_questions_is_made_again(studied: Path, refuses: Callable[..., str]) -> None:
    questions = studied / "data/test.jsonl"
    questions.write_text("\n".join(questions.read_text().splitlines()[:15]) + "\n")
    said = refuses(5, "fedcollm evaluate --zero-shot --model llm")
    assert "results/zero-shot/llm.json is of other questions" in said


def test_rows_that_were_changed_since_training_are_refused(studied: Path, refuses: Callable[..., str]) -> None:
    data = studied / "private/client-2/train.jsonl"
    data.unlink()
    write_rows(data, rows(5))
    said = refuses(5, "put those rows back, or fedcollm run --overwrite")
    assert "private/client-2/train.jsonl is not what was trained on in round 1" in said


def test_rows_that_were_dealt_before_their_task_was_edited_are_refused(
    studied: Path, refuses: Callable[..., str]
) -> None:
    digest = hashlib.sha256((studied / "private/client-1/train.jsonl").read_bytes()).hexdigest()
    split = {"sources_sha256": "0" * 64, "parties": {"client-1": {"sha256": digest}}}
    (studied / "private/split.json").write_text(json.dumps(split))
    said = refuses(5, "fedcollm prepare")
    assert (
        "client-1 of round 1 is stale: trained on rows that prepare made before its tasks, or files, were edited"
        in said
    )


def test_what_scores_lack_stands_below_the_tables(studied: Path, fedcollm: Callable[..., Outcome]) -> None:
    assert "questions longer" not in fedcollm("compare", "-w", studied).out
    path = studied / "results/zero-shot/slm.json"
    result = json.loads(path.read_text())
    result["tasks"]["colours"] |= {"cut": 2, "questions_in_all": 90}
    rewrite(path, result)
    for form in ([], ["--markdown"]):
        said = " ".join(fedcollm("compare", *form, "-w", studied).out.split())
        assert "questions longer than a model's context, scored without their beginning: up to 2 of colours" in said
        assert "only the first questions count, by evaluation.limit: 20 of 90 of colours" in said


def test_a_metric_that_is_not_right_or_wrong_is_named_with_those_that_are(refuses: Callable[..., str]) -> None:
    said = refuses(2, "--metric with one of its metrics: acc", "--metric", "f1")
    assert "does not say which questions of colours were right by f1" in said


def test_accuracy_under_attack_is_compared_if_that_is_asked_for_and_the_attack_is_one(
    studied: Path, refuses: Callable[..., str], fedcollm: Callable[..., Outcome]
) -> None:
    plain = fedcollm("compare", "--json", "-w", studied).out
    attack = {"radius": 0.1, "steps": 5, "step_size": None}
    for path in studied.rglob("results/*/*.json"):
        result = json.loads(path.read_text())
        signs = result["tasks"]["colours"]["correct"]["acc"]
        result["tasks"]["colours"]["correct"]["robust_acc"] = "0" + signs[1:]
        rewrite(path, {**result, "attack": attack})
    assert fedcollm("compare", "--json", "-w", studied).out == plain
    found = json.loads(fedcollm("compare", "--metric", "robust_acc", "--json", "-w", studied).out)
    score = found["tables"]["slm"]["fedavg"]["colours"]["mean"]
    assert score <= json.loads(plain)["tables"]["slm"]["fedavg"]["colours"]["mean"]
    assert found["remarks"] == ["robust_acc: under attack, radius 0.1, steps 5", *json.loads(plain)["remarks"]]
    path = studied / "results/round-0002/slm.json"
    rewrite(path, {**json.loads(path.read_text()), "attack": attack | {"steps": 1}})
    said = refuses(5, "score them all with the same --attack and --attack-steps", "--metric", "robust_acc")
    words = "was measured under another attack than the rest: radius 0.1, steps 1, not radius 0.1, steps 5"
    assert f"robust_acc of slm {words}" in said


@pytest.mark.parametrize(
    ("words", "message", "mend"),
    [
        (("--seeds", "1;2"), "--seeds '1;2' is not a list of seeds", "such as --seeds 1,2,3"),
        (("--seeds", ""), "--seeds '' is not a list of seeds", "such as --seeds 1,2,3"),
        (("--methods", "fedavg,fedsgd"), "there is no method 'fedsgd'", "there are: fedcollm, fedavg, fedavg-aux"),
    ],
)
def test_lists_that_are_none_are_refused(words: tuple[str, ...], message: str, mend: str, refuses: Any) -> None:
    assert message in refuses(2, mend, *words)


def test_a_folder_that_is_no_seed_is_passed_over(studied: Path, fedcollm: Callable[..., Outcome]) -> None:
    shutil.copytree(studied / "seeds/seed-8", studied / "seeds/seed-old", symlinks=True)
    (studied / "seeds/seed-9").mkdir()
    outcome = fedcollm("compare", "--json", "-w", studied)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["seeds"] == [7, 8]


def test_centralized_needs_every_partys_data_here(studied: Path, fedcollm: Callable[..., Outcome]) -> None:
    shutil.rmtree(studied / "baselines/centralized")
    (studied / "private/client-2/train.jsonl").unlink()
    outcome = fedcollm("run", "--method", "centralized", "-w", studied)
    assert outcome.code == 2
    assert (
        "centralized needs every party's data on this machine; private/client-2/train.jsonl is not here" in outcome.err
    )
    assert "leave it out" in outcome.err


def test_a_federation_run_anew_on_other_rows_is_not_set_beside_baselines_on_the_old(
    studied: Path, refuses: Callable[..., str]
) -> None:
    place = studied / "private/client-1/train.jsonl"
    place.unlink()  # the new rows arrive under the old name: the baselines' link stays with the old ones
    write_rows(place, rows(11, start=1))
    run(Workspace(studied), overwrite=True)
    said = refuses(5, "put those rows back, or fedcollm run --method fedavg --overwrite", "--seeds", "7", "--collect")
    assert "baselines/fedavg/private/client-1/train.jsonl has other rows than private has now" in said


@pytest.mark.parametrize(
    ("changes", "where"),
    [({"dtype": "bfloat16"}, "exchange/round-0002/client-1"), ({"base": "0" * 64}, "exchange/round-0002/client-1")],
)
def test_models_of_another_base_or_precision_are_not_compared(
    changes: dict[str, str], where: str, studied: Path, refuses: Callable[..., str]
) -> None:
    for number in (1, 2):
        path = studied / f"baselines/standalone/exchange/round-{number:04d}/client-1/manifest.json"
        value = json.loads(path.read_text())
        if "base" in changes:
            value["base"]["weights_sha256"] = changes["base"]
        else:
            value |= changes
        path.write_text(json.dumps(value))
    said = refuses(5, "fedcollm run --workspace baselines/standalone --overwrite")
    assert f"baselines/standalone/{where} was tuned from another base or in another precision than the rest" in said


def test_a_result_in_another_precision_is_scored_anew(studied: Path, refuses: Callable[..., str]) -> None:
    path = studied / "baselines/fedavg/results/round-0002/client-2.json"
    rewrite(path, json.loads(path.read_text()) | {"dtype": "bfloat16"})
    mend = "fedcollm evaluate --round 2 --client 2 --workspace baselines/fedavg --overwrite"
    assert "was scored in another precision than results/zero-shot/slm.json" in refuses(
        5, f"score both anew in one: {mend}"
    )


def test_what_follows_from_an_update_that_was_made_again_is_made_again(
    studied: Path, refuses: Callable[..., str], fedcollm: Callable[..., Outcome]
) -> None:
    place = studied / "baselines/fedavg/exchange/round-0002/client-1/manifest.json"
    place.write_text(place.read_text() + "\n")
    assert fedcollm("evaluate", "--round", 2, "--client", 1, "-w", studied / "baselines/fedavg").code == 0
    said = refuses(5, "fedcollm run --workspace baselines/fedavg --overwrite")
    assert "aggregate of round 2 is stale: made from another client-1" in said


def test_a_baseline_has_no_baselines_and_is_compared_from_where_it_belongs(
    studied_once: Path, fedcollm: Callable[..., Outcome]
) -> None:
    inside = studied_once / "baselines/fedavg"
    outcome = fedcollm("run", "--method", "standalone", "-w", inside)
    assert outcome.code == 2
    assert f"mend  fedcollm run --method standalone --workspace {studied_once}" in outcome.err
    assert not (inside / "baselines").exists()
    outcome = fedcollm("compare", "-w", inside)
    assert outcome.code == 2
    assert f"mend  fedcollm compare --workspace {studied_once}" in outcome.err


def test_results_of_different_tasks_are_named() -> None:
    check_tasks([{"arc": 1, "obqa": 1}, {"obqa": 1, "arc": 1}])
    with pytest.raises(Refused, match="some results have scores of 'obqa', and some have none"):
        check_tasks([{"arc": 1}, {"arc": 1, "obqa": 1}])
