"""plan with FedMKT: each model by itself, as long as the manifests then say, and what each client tells and is told."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome, edit, rows, write_rows
from stages.artefacts.reading import read_manifest
from stages.planning.estimates import StagePlan
from stages.planning.plan import Plan, plan
from stages.runtime.errors import UsageProblem
from stages.workspace.paths import Workspace


def stages_of(found: Plan) -> dict[str, StagePlan]:
    assert len({stage.name for stage in found.stages}) == len(found.stages)
    return {stage.name: stage for stage in found.stages}


def test_steps_adapters_and_bytes_are_those_of_the_manifests(unlike: Path) -> None:
    workspace = Workspace(unlike)
    found = plan(workspace)
    stages = stages_of(found)
    for client, number in ((1, ""), (2, " 2"), (3, " 3")):
        trained, _ = read_manifest(workspace.client_trained(1, client))
        distilled, _ = read_manifest(workspace.client_adapter(1, client))
        assert stages[f"client-train{number}"].steps == (trained.steps, trained.steps)
        assert stages[f"client-distill{number}"].steps == (distilled.steps, distilled.steps)
        assert stages[f"client-train{number}"].party == f"client {client}"
        assert found.models[client - 1].adapter_parameters == trained.parameters
        told, _ = read_manifest(workspace.knowledge(1, client))
        assert found.sent[f"client {client} sends"] == told.files["knowledge.safetensors"].size_bytes
    llm, _ = read_manifest(workspace.llm(1))
    assert stages["co-distill"].steps == (llm.steps, llm.steps)
    assert found.models[-1].adapter_parameters == llm.parameters
    exchanged = sum(path.stat().st_size for path in workspace.exchange.rglob("*.safetensors"))
    assert found.disk["exchange"] == exchanged
    kept = sum(path.stat().st_size for path in workspace.private.glob("client-*/round-*/*/adapter_model.safetensors"))
    assert found.disk["clients"] == kept


def test_where_clients_are_averaged_disk_and_bytes_are_those_of_the_files(equal: Path) -> None:
    def bytes_of(pattern: str) -> int:
        return sum(path.stat().st_size for path in equal.glob(pattern))

    found = plan(Workspace(equal))
    assert "aggregate" in stages_of(found)
    assert found.disk["exchange"] == bytes_of("exchange/round-*/*/*.safetensors")
    assert found.disk["clients"] == bytes_of("private/client-*/round-*/*/adapter_model.safetensors")
    assert found.disk["server"] == bytes_of("private/server/round-*/*/adapter_model.safetensors")
    for client in (1, 2, 3):
        sent = [f"exchange/round-0002/{name}client-{client}/*.safetensors" for name in ("", "adapter-")]
        assert found.sent[f"client {client} sends"] == sum(map(bytes_of, sent))
        received = [f"exchange/round-0002/{name}/*.safetensors" for name in ("broadcast", "server")]
        assert found.sent[f"client {client} receives"] == sum(map(bytes_of, received))


def test_no_stage_has_two_models_in_its_memory(unlike_folder: Path) -> None:
    found = plan(Workspace(unlike_folder))
    held = [4 * one.parameters for one in found.models]  # float32
    weights = {stage.name: stage.memory["weights"] for stage in found.stages}
    assert set(weights.values()) == set(held)
    for name in ("co-distill", "share-knowledge llm", "evaluate llm"):
        assert weights[name] == held[-1]
    assert [weights[f"client-distill{number}"] for number in ("", " 2", " 3")] == held[:3]
    assert found.two_phases == []


def test_asking_takes_a_pass_over_the_rows_and_no_gradients(unlike_folder: Path) -> None:
    (unlike_folder / "machine.toml").write_text("micro_batch = 3\n")
    stages = stages_of(plan(Workspace(unlike_folder)))
    asks, learns = stages["share-knowledge 2"], stages["client-distill 2"]
    assert asks.steps == (math.ceil(12 / 3), 4)
    assert (asks.rows, asks.batch) == ((12, 12), 3)
    assert "gradients" not in asks.memory
    assert sum(asks.memory.values()) < sum(learns.memory.values())


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("llm2slm", {"client-train", "share-knowledge llm", "client-distill"}),
        ("standalone-public", {"client-train", "client-distill"}),
    ],
)
def test_a_baseline_has_the_stages_that_it_takes(method: str, steps: set[str], unlike_folder: Path) -> None:
    edit(unlike_folder / "fedcollm.toml", '"fedmkt"', f'"{method}"')
    names = {stage.name for stage in plan(Workspace(unlike_folder)).stages}
    assert {name for name in names if not name.endswith((" 2", " 3")) and not name.startswith("evaluate")} == steps


def test_clients_that_share_a_model_are_one_line(unlike_folder: Path) -> None:
    toml = unlike_folder / "fedcollm.toml"
    toml.write_text(toml.read_text().partition("[clients.2.slm]")[0])
    stages = stages_of(plan(Workspace(unlike_folder)))
    assert stages["client-train"].party == "each client"
    assert [name for name in stages if name.startswith("client-")] == ["client-train", "client-distill"]


@pytest.mark.parametrize("divergence", ["sorted", "spans", "reverse"])
def test_every_divergence_can_be_planned(divergence: str, unlike_folder: Path) -> None:
    edit(unlike_folder / "fedcollm.toml", "top_k = 32", f'top_k = 32\ndivergence = "{divergence}"')
    assert stages_of(plan(Workspace(unlike_folder)))["client-distill"].memory


def test_a_client_s_model_that_is_not_here_is_missing_and_the_others_are_planned(unlike_folder: Path) -> None:
    edit(unlike_folder / "fedcollm.toml", "models/slm-2", "nobody/nothing")
    found = plan(Workspace(unlike_folder))
    [absent] = [one.what for one in found.missing if "nothing" in one.what]
    assert absent == "the SLM nobody/nothing, of client 2"
    stages = stages_of(found)
    assert stages["client-train 2"].memory == {}
    assert stages["client-train 3"].memory
    assert found.disk == {}


def test_rows_that_training_would_refuse_are_named_by_the_file_of_each_who_reads_it(unlike_folder: Path) -> None:
    long = [{"prompt": "blue " * 200, "completion": " red"}]
    for name in ("client-2/train", "client-2/public", "server/auxiliary"):
        write_rows(unlike_folder / f"private/{name}.jsonl", [*rows(4), *long])
    found = [one.what for one in plan(Workspace(unlike_folder)).missing]
    names = ["client-2/train.jsonl, line 5 of train", "client-2/public.jsonl, line 5 of public"]
    names += ["server/auxiliary.jsonl, line 5 of auxiliary"]
    said = [f"rows that can be trained on: in private/{name}.jsonl has " for name in names]
    assert [one[: len(start)] for one, start in zip(found, said, strict=True)] == said
    assert all(one.endswith(" tokens; max_length is 512, the model's context 128") for one in found)


def test_public_rows_of_which_none_has_a_completion_are_missing(unlike_folder: Path) -> None:
    place = unlike_folder / "private/client-2/public.jsonl"
    write_rows(place, [{"prompt": row["prompt"]} for row in rows(4)])
    assert [one.what for one in plan(Workspace(unlike_folder)).missing] == [
        "rows that can be trained on: no row of private/client-2/public.jsonl has a completion"
    ]


def test_rows_that_no_model_takes_are_refused_and_without_data_the_steps_are_unknown(unlike_folder: Path) -> None:
    with pytest.raises(UsageProblem, match="these models take 128"):
        plan(Workspace(unlike_folder), length=129)
    shutil.rmtree(unlike_folder / "private")
    edit(unlike_folder / "fedcollm.toml", "steps = 5", "epochs = 1.0")
    assert stages_of(plan(Workspace(unlike_folder)))["co-distill"].steps is None


def test_the_table_has_a_row_for_each_stage(unlike: Path, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm("plan", "-w", unlike)
    assert outcome.code == 0
    said = " ".join(outcome.out.split())
    for words in (
        "client-distill 3",
        "share-knowledge llm",
        "together",
        "client 2 receives once",
        "nothing is missing",
    ):
        assert words in said
