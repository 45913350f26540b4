"""What is left, as a chain of jobs: what submit.sh submits, from what lies in a workspace."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from builders import edit, rewrite
from federations import SECURE, agreement, enrol
from stages.federation.jobs import Job
from stages.federation.slurm import jobs
from stages.runtime.errors import NotReady, Refused
from stages.workspace.paths import Workspace


def listed(folder: Path, only: str | None = None, window: int | None = None) -> list[str]:
    found = jobs(Workspace(folder), only=only, window=window)
    return [f"{job.script} {job.round} {job.tasks}".rstrip() for job in found.jobs]


A_ROUND = ["client {0} 1-3", "server {0}"]
SECURE_ROUND = ["client {0} 1-3", "close {0}", "reveal {0} 1-3", "server {0}"]


def rounds(*numbers: int, steps: list[str] = A_ROUND) -> list[str]:
    return [step.format(number) for number in numbers for step in steps]


@pytest.mark.parametrize(
    ("clients", "tasks"),
    [((), ""), ((2,), "2"), ((1, 2, 3, 4), "1-4"), ((1, 3, 4, 7, 9, 10), "1,3-4,7,9-10")],
)
def test_clients_are_the_tasks_of_an_array(clients: tuple[int, ...], tasks: str) -> None:
    assert Job("client", 1, clients).tasks == tasks


def test_from_the_start_every_round_is_listed(workspace_folder: Path) -> None:
    assert listed(workspace_folder) == ["broadcast 1", *rounds(1, 2), "evaluate 2"]


def test_a_finished_federation_lacks_its_scores_and_then_nothing(finished: Path) -> None:
    assert listed(finished) == ["evaluate 2"]
    for name in ("zero-shot/slm", "zero-shot/llm", "round-0002/slm", "round-0002/llm"):
        path = finished / f"results/{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert listed(finished) == ["evaluate 2"]
    for client in (1, 2, 3):
        (finished / f"results/round-0002/client-{client}.json").touch()
    assert listed(finished) == []


def test_scores_of_other_questions_are_made_again(finished: Path) -> None:
    here = Workspace(finished)
    current = {"tasks_sha256": here.tasks_sha256(), "agreement_sha256": here.agreement_sha256}
    names = ["zero-shot/slm", "zero-shot/llm", "round-0002/slm", "round-0002/llm"]
    for name in [*names, *(f"round-0002/client-{client}" for client in (1, 2, 3))]:
        path = finished / f"results/{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        adapter = finished / ("exchange" if "client" in name else "private/server") / name
        digest = hashlib.sha256((adapter / "manifest.json").read_bytes()).hexdigest() if "round" in name else None
        rewrite(path, current | {"manifest_sha256": digest})
    assert listed(finished) == []
    (finished / "data/test.jsonl").write_text((finished / "data/train.jsonl").read_text() * 2)
    assert listed(finished) == ["evaluate 2"]


def test_nothing_is_trained_on_rows_whose_task_was_edited(workspace_folder: Path) -> None:
    (workspace_folder / "private/split.json").write_text(f'{{"sources_sha256": "{64 * "0"}"}}')
    with pytest.raises(Refused, match="prepare dealt the rows before its tasks") as caught:
        listed(workspace_folder)
    assert "fedcollm prepare" in str(caught.value.mend)


def test_only_the_clients_that_have_not_answered_are_asked(answered: Path) -> None:
    shutil.rmtree(answered / "exchange/round-0001/client-2")
    assert listed(answered) == ["client 1 2", "server 1", *rounds(2), "evaluate 2"]


@pytest.mark.parametrize("last", ["aggregate", "llm"])
def test_a_round_that_stopped_at_the_server_goes_on_there(answered: Path, finished_once: Path, last: str) -> None:
    folder = answered / "private/server/round-0001"
    for name in ["aggregate", "llm"][: ["aggregate", "llm"].index(last) + 1]:
        shutil.copytree(finished_once / f"private/server/round-0001/{name}", folder / name)
    assert listed(answered) == ["server 1", *rounds(2), "evaluate 2"]


def test_a_broadcast_that_alone_is_missing_between_rounds_is_a_job_of_its_own(finished: Path) -> None:
    shutil.rmtree(finished / "exchange/round-0002")
    shutil.rmtree(finished / "private/server/round-0002")
    assert listed(finished) == ["broadcast 2", *rounds(2), "evaluate 2"]


def test_a_window_ends_in_a_job_that_asks_again(workspace_folder: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", "rounds = 2", "rounds = 5")
    assert listed(workspace_folder, window=2) == ["broadcast 1", *rounds(1, 2), "window 3"]
    assert listed(workspace_folder, window=5) == ["broadcast 1", *rounds(1, 2, 3, 4, 5), "evaluate 5"]


def test_a_window_counts_a_round_that_lacks_its_broadcast_alone_as_begun(finished: Path) -> None:
    shutil.rmtree(finished / "exchange/round-0002")
    shutil.rmtree(finished / "private/server/round-0002")
    assert listed(finished, window=1) == ["broadcast 2", *rounds(2), "evaluate 2"]


def test_what_is_stale_is_left_to_a_person(finished: Path) -> None:
    edit(finished / "fedcollm.toml", "seed = 7", "seed = 8")
    with pytest.raises(Refused, match="broadcast of round 1 is stale") as refused:
        listed(finished)
    assert refused.value.mend == "fedcollm broadcast --round 1 --overwrite"


# --- other methods


def test_fedavg_trains_nothing_at_the_server_and_scores_the_average(workspace_folder: Path) -> None:
    (workspace_folder / "fedcollm.toml").write_text(agreement(aggregation="", method="fedavg"))
    assert listed(workspace_folder) == ["broadcast 1", *rounds(1, 2), "evaluate 2"]


def test_standalone_clients_have_no_server_after_the_first_broadcast(workspace_folder: Path) -> None:
    (workspace_folder / "fedcollm.toml").write_text(agreement(aggregation="", method="standalone"))
    assert listed(workspace_folder) == ["broadcast 1", "client 1 1-3", "client 2 1-3", "evaluate 2"]


def test_secure_mode_closes_each_round_and_has_it_revealed(enrolled: Path) -> None:
    assert listed(enrolled) == ["broadcast 1", *rounds(1, 2, steps=SECURE_ROUND), "evaluate 2"]


def test_in_encrypted_mode_one_client_reveals_each_round(enrolled: Path) -> None:
    (enrolled / "fedcollm.toml").write_text(agreement(aggregation='mode = "encrypted"\nopener = 2\n'))
    enrol(Workspace(enrolled), renew=True)
    steps = ["reveal {0} 2" if line.startswith("reveal") else line for line in SECURE_ROUND]
    assert listed(enrolled) == ["broadcast 1", *rounds(1, 2, steps=steps), "evaluate 2"]


def test_secure_mode_without_keys_is_told_before_anything_is_submitted(workspace_folder: Path) -> None:
    (workspace_folder / "fedcollm.toml").write_text(agreement(aggregation=SECURE))
    with pytest.raises(NotReady, match="client-1 is not enrolled") as refused:
        listed(workspace_folder)
    assert refused.value.mend == "fedcollm keys --client 1"


# --- sites that hold one party


def test_a_clients_site_submits_its_own_next_job_when_the_broadcast_has_come(finished: Path) -> None:
    shutil.rmtree(finished / "exchange/round-0002/client-2")
    shutil.rmtree(finished / "private/server")
    assert listed(finished, only="client-2") == ["client 2 2"]
    shutil.rmtree(finished / "exchange/round-0002")
    with pytest.raises(NotReady, match="waiting for the broadcast of round 2"):
        listed(finished, only="client-2")


def test_a_clients_site_whose_part_is_done_has_nothing_to_submit(finished: Path) -> None:
    shutil.rmtree(finished / "private/server")
    assert listed(finished, only="client-2") == []


def test_a_servers_site_waits_for_updates_from_elsewhere(answered: Path) -> None:
    for client in (1, 2, 3):
        shutil.rmtree(answered / f"private/client-{client}")
    found = jobs(Workspace(answered))
    assert found.jobs == [Job("server", 1)]
    assert found.waiting_for == "client-1, client-2, client-3 of round 2"
    shutil.rmtree(answered / "exchange/round-0001/client-3")
    with pytest.raises(NotReady, match="waiting for client-3 of round 1") as caught:
        listed(answered)
    assert "of clients 1 to 3 no rows are here: whoever has none here sends from elsewhere" in str(caught.value.mend)


def test_a_server_with_a_quorum_does_not_wait_for_the_last_client(answered: Path) -> None:
    text = (answered / "fedcollm.toml").read_text() + "\n[aggregation]\nmin_clients = 2\n"
    other = shutil.copytree(answered, answered.parent / "quorum", symlinks=True)
    shutil.rmtree(other / "exchange")
    (other / "fedcollm.toml").write_text(text)
    for client in (2, 3):
        shutil.rmtree(other / f"private/client-{client}")
    with pytest.raises(NotReady, match="waiting for the broadcast"):
        listed(other, only="client-1")
    found = jobs(Workspace(other))  # the server and client 1: one update of the two it needs
    assert [job.script for job in found.jobs] == ["broadcast", "client"]
    assert found.waiting_for == "client-2, client-3 of round 1"


def test_a_clients_site_in_secure_mode_trains_and_then_reveals(enrolled: Path) -> None:
    with pytest.raises(NotReady, match="waiting for the broadcast of round 1"):
        listed(enrolled, only="client-2")
    assert listed(enrolled, only="server") == ["broadcast 1"]
    assert jobs(Workspace(enrolled), only="server").waiting_for == "client-1, client-2, client-3 of round 1"


def test_a_party_without_data_here_is_told_so(workspace_folder: Path) -> None:
    shutil.rmtree(workspace_folder / "private/client-2")
    with pytest.raises(NotReady, match="client-2 has no data here"):
        listed(workspace_folder, only="client-2")


# --- what compute nodes would miss


@pytest.mark.parametrize(
    ("party", "absent", "job"),
    [("client-2", "slm", None), ("client-2", "llm", "client 1 2"), ("server", "llm", None), ("server", "slm", None)],
)
def test_a_model_that_a_party_needs_and_has_not_is_named_before_anything_is_submitted(
    answered: Path, base_models: Path, party: str, absent: str, job: str | None
) -> None:
    if party == "client-2":
        shutil.rmtree(answered / "exchange/round-0001/client-2")
    (answered / "models").unlink()
    (answered / "models").mkdir()
    for role in {"slm", "llm"} - {absent}:
        (answered / "models" / role).symlink_to(base_models / role)
    if job:
        assert listed(answered, only=party) == [job]
        return
    with pytest.raises(NotReady, match=rf"the {absent.upper()} models/{absent}[\s\S]*mend"):
        listed(answered, only=party)


def test_a_dataset_of_the_hub_that_is_not_here_is_named_with_prefetch(finished: Path) -> None:
    (finished / "tasks/colours.yaml").write_text("task: colours\ndataset_path: nobody/nothing-here\n")
    with pytest.raises(NotReady, match=r"colours[\s\S]*fedcollm prefetch"):
        listed(finished)
