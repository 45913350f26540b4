"""What is left of FedMKT as a chain of jobs: which there are, and which waits for which."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from builders import edit, make_workspace
from stages.federation.job import Job
from stages.federation.jobs_in_public import linked
from stages.federation.slurm import jobs
from stages.runtime.errors import NotReady
from stages.workspace.paths import Workspace


def listed(folder: Path, only: str | None = None, window: int | None = None) -> list[str]:
    return [job.line for job in jobs(Workspace(folder), only=only, window=window).jobs]


def with_method(folder: Path, method: str) -> Path:
    edit(folder / "fedcollm.toml", 'method = "fedmkt"', f'method = "{method}"')
    return folder


def with_quorum(folder: Path) -> Path:
    edit(folder / "fedcollm.toml", "[evaluation]", "[aggregation]\nmin_clients = 2\n[evaluation]")
    return folder


FIRST_ROUND = ["client 1 1-3", "server 1 - afterok:client/1", "distill 1 1-3 aftercorr:client/1 afterok:server/1"]
SECOND_ROUND = [
    "client 2 1-3 aftercorr:distill/1",
    "server 2 - afterok:server/1 afterok:client/2",
    "distill 2 1-3 aftercorr:client/2 afterok:server/2",
]
SCORES = "evaluate 2 - afterok:server/2 afterok:client/2 afterok:distill/2"


def test_a_client_waits_for_itself_and_for_the_server_alone(unlike_folder: Path) -> None:
    assert listed(unlike_folder) == [*FIRST_ROUND, *SECOND_ROUND, SCORES]


def test_with_a_quorum_the_server_follows_the_clients_whichever_way_they_end(unlike_folder: Path) -> None:
    after = [line.partition("- ")[2] for line in listed(with_quorum(unlike_folder)) if line.startswith(("s", "e"))]
    assert after == [
        "afterany:client/1",
        "afterok:server/1 afterany:client/2",
        "afterok:server/2 afterany:client/2 afterany:distill/2",
    ]


def test_a_fixed_llm_tells_once_and_no_client_waits_for_it_to_train(unlike_folder: Path) -> None:
    assert listed(with_method(unlike_folder, "llm2slm")) == [
        "client 1 1-3",
        "server 1 -",
        "distill 1 1-3 aftercorr:client/1 afterok:server/1",
        "client 2 1-3 aftercorr:distill/1",
        "distill 2 1-3 aftercorr:client/2 afterok:server/1",
        "evaluate 2 - afterok:server/1 afterok:client/2 afterok:distill/2",
    ]


def test_without_a_teacher_there_is_no_server(unlike_folder: Path) -> None:
    found = [
        "client 1 1-3",
        "distill 1 1-3 aftercorr:client/1",
        "client 2 1-3 aftercorr:distill/1",
        "distill 2 1-3 aftercorr:client/2",
        "evaluate 2 - afterok:client/2 afterok:distill/2",
    ]
    assert listed(with_method(unlike_folder, "standalone-public")) == found


def test_standalone_clients_with_models_of_their_own_are_sent_no_adapter(unlike_folder: Path) -> None:
    assert listed(with_method(unlike_folder, "standalone")) == ["client 1 1-3", "client 2 1-3", "evaluate 2"]


def test_one_model_for_all_begins_with_one_adapter(tmp_path: Path, base_models: Path) -> None:
    folder = make_workspace(tmp_path / "study", base_models)
    edit(folder / "fedcollm.toml", "rounds = 2", 'rounds = 2\nmethod = "standalone-public"')
    for client in (1, 2, 3):
        shutil.copy(folder / "private/server/auxiliary.jsonl", folder / f"private/client-{client}/public.jsonl")
    assert listed(folder)[:2] == ["broadcast 1 -", "client 1 1-3 afterok:broadcast/1"]


def test_a_window_waits_for_all_that_its_last_round_has(unlike_folder: Path) -> None:
    window = "window 2 - afterok:server/1 afterok:client/1 afterok:distill/1"
    assert listed(unlike_folder, window=1) == [*FIRST_ROUND, window]


# --- clients that are averaged


def test_where_clients_are_averaged_all_of_them_wait_for_the_average(equal_folder: Path) -> None:
    assert listed(equal_folder) == [
        "broadcast 1 -",
        "client 1 1-3 afterok:broadcast/1",
        *FIRST_ROUND[1:],
        "average 1 - afterok:distill/1",
        "client 2 1-3 afterok:average/1",
        *SECOND_ROUND[1:],
        "average 2 - afterok:distill/2",
        f"{SCORES} afterok:average/2",
    ]
    after = [line for line in listed(with_quorum_of_two(equal_folder)) if line.startswith("average")]
    assert after == ["average 1 - afterany:distill/1", "average 2 - afterany:distill/2"]


def with_quorum_of_two(folder: Path) -> Path:
    edit(folder / "fedcollm.toml", "average = true", "average = true\nmin_clients = 2")
    return folder


def test_of_averaged_clients_only_what_is_missing_is_asked_for_and_late_ones_are_passed_over(equal: Path) -> None:
    remove(equal, "exchange/round-0002/adapter-client-2", "private/server/round-0002/aggregate")
    rest = ["average 2 - afterok:distill/2", "evaluate 2 - afterok:distill/2 afterok:average/2"]
    assert listed(equal) == ["distill 2 2", *rest]
    remove(equal, "exchange/round-0002/broadcast", "private/server/round-0001/aggregate")
    remove(equal, "exchange/round-0001/adapter-client-3")
    assert listed(equal)[:2] == ["distill 1 3", "average 1 - afterok:distill/1"]


def test_each_site_of_averaged_clients_does_its_part_and_waits_for_the_other(equal: Path, tmp_path: Path) -> None:
    site = shutil.copytree(equal, tmp_path / "of client 2", symlinks=True)
    remove(site, "private/server", "private/client-1", "private/client-3", "exchange/round-0002/broadcast")
    sent = ("exchange/round-0002/client-2", "exchange/round-0002/adapter-client-2")
    remove(site, "private/client-2/round-0002", *sent)
    with pytest.raises(NotReady, match="waiting for the broadcast of round 2"):
        jobs(Workspace(site), only="client-2")
    shutil.copytree(equal / "exchange/round-0002/broadcast", site / "exchange/round-0002/broadcast")
    remove(site, "exchange/round-0001/adapter-client-2")  # too late: the next round has begun
    assert listed(site, only="client-2") == [
        "client 2 2",
        "distill 2 2 aftercorr:client/2",
        "evaluate 2 - afterok:client/2 afterok:distill/2",
    ]
    server = remove(equal, *(f"private/client-{k}" for k in (1, 2, 3)), "private/server/round-0002/aggregate")
    assert listed(server, only="server") == ["average 2 -", "evaluate 2 - afterok:average/2"]
    remove(server, "exchange/round-0002/adapter-client-2")
    with pytest.raises(NotReady, match="waiting for the adapters of client-2 in round 2"):
        jobs(Workspace(server), only="server")


def test_a_client_that_was_absent_for_all_of_round_one_begins_with_round_two(equal: Path) -> None:
    remove(equal, "exchange/round-0001/vocabulary-client-2", "exchange/round-0002/server", "private/server/round-0002")
    for t in (1, 2):
        sent = (f"exchange/round-000{t}/{name}" for name in ("client-2", "adapter-client-2"))
        remove(equal, f"private/client-2/round-000{t}", *sent)
    assert listed(equal) == [
        "client 2 2",
        "server 2 - afterok:client/2",
        "distill 2 2 aftercorr:client/2 afterok:server/2",
        "average 2 - afterok:distill/2",
        f"{SCORES} afterok:average/2",
    ]


# --- what is there is passed over


def remove(folder: Path, *places: str) -> Path:
    for place in places:
        shutil.rmtree(folder / place)
    return folder


def test_a_finished_federation_lacks_its_scores_and_then_nothing(unlike: Path) -> None:
    assert listed(unlike) == ["evaluate 2 -"]
    for name in ("zero-shot/slm", "zero-shot/client-2", "zero-shot/client-3", "zero-shot/llm", "round-0002/llm"):
        (unlike / f"results/{name}.json").parent.mkdir(parents=True, exist_ok=True)
        (unlike / f"results/{name}.json").touch()
    assert listed(unlike) == ["evaluate 2 -"]
    for client in (1, 2, 3):
        (unlike / f"results/round-0002/client-{client}.json").touch()
    assert listed(unlike) == []


def test_only_what_is_missing_is_asked_for(unlike: Path) -> None:
    remove(unlike, "exchange/round-0002/client-2", "exchange/round-0002/server", "private/server/round-0002/llm")
    remove(unlike, "private/client-2/round-0002/slm")
    assert listed(unlike) == [
        "client 2 2",
        "server 2 - afterok:client/2",
        "distill 2 2 aftercorr:client/2 afterok:server/2",
        SCORES,
    ]


def test_a_task_that_others_wait_for_is_there_even_if_its_work_is_done(unlike: Path) -> None:
    """Slurm cancels a task whose counterpart of the same number the job before has not."""
    agreement = Workspace(unlike).agreement
    chain = [Job("client", 1, (3,)), Job("distill", 1, (2, 3)), Job("client", 2, (1, 2, 3))]
    assert [job.line for job in linked(agreement, chain)] == [
        "client 1 1-3",
        "distill 1 1-3 aftercorr:client/1",
        "client 2 1-3 aftercorr:distill/1",
    ]


# --- sites that hold one party


def test_a_clients_site_goes_on_as_soon_as_the_server_has_told(unlike: Path) -> None:
    remove(unlike, "exchange/round-0002", "private/server", "private/client-2/round-0002")
    remove(unlike, "private/client-1", "private/client-3", "private/client-2/round-0001/slm")
    found = jobs(Workspace(unlike))
    assert [job.line for job in found.jobs] == ["distill 1 2", "client 2 2 aftercorr:distill/1"]
    assert found.waiting_for == "what the server knows in round 2"


def test_a_clients_site_scores_its_own_model(unlike: Path) -> None:
    remove(unlike, "private/server", "private/client-1", "private/client-3")
    assert listed(unlike) == listed(unlike, only="client-2") == ["evaluate 2 -"]


def test_a_servers_site_waits_for_what_clients_know(unlike: Path) -> None:
    remove(unlike, "private/client-1", "private/client-2", "private/client-3", "private/server/round-0002")
    remove(unlike, "exchange/round-0002/client-3", "exchange/round-0002/server")
    with pytest.raises(NotReady, match="waiting for what client-3 knows in round 2"):
        listed(unlike)


def test_a_servers_site_with_enough_clients_does_not_wait(unlike: Path) -> None:
    other = with_quorum(remove(unlike, "exchange/round-0001"))
    for place in [*other.glob("private/*/round-*"), other / "exchange/round-0002", *other.glob("private/client-[23]")]:
        shutil.rmtree(place)
    found = jobs(Workspace(other))  # client 1 and the server are here; two are needed
    assert [job.line for job in found.jobs] == ["client 1 1"]
    assert found.waiting_for == "what client-2, client-3 knows in round 1"


# --- what compute nodes would miss


def test_a_clients_own_model_and_the_public_rows_are_looked_for_before_anything_is_submitted(
    unlike_folder: Path, unlike_models: Path
) -> None:
    (unlike_folder / "models").unlink()
    (unlike_folder / "models").mkdir()
    for name in ("slm-1", "slm-3"):
        (unlike_folder / "models" / name).symlink_to(unlike_models / name)
    (unlike_folder / "private/client-3/public.jsonl").unlink()
    with pytest.raises(NotReady, match="compute nodes fetch nothing") as refused:
        listed(unlike_folder)
    said = refused.value.message
    assert "the SLM models/slm-2, of client 2" in said
    assert "models/llm" in said
    assert "the public rows, the same file at every party" in said
    assert "put them into private/client-3/public.jsonl" in said
    assert "models/slm-1" not in said
    assert listed(unlike_folder, only="client-1") == ["client 1 1"]
