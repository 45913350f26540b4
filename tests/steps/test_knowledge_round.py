"""A round of FedMKT by its steps: what each reads and writes, what is chosen, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from builders import edit
from processes import start_together
from stages.align_party import align_party
from stages.artefacts.reading import read_manifest
from stages.client_distill import client_distill
from stages.client_train import client_train
from stages.co_distill import co_distill
from stages.distillation.lessons import chosen
from stages.files.reading import sha256
from stages.runtime.errors import Damaged, NotReady, Problem, Refused, UsageProblem
from stages.runtime.events import Event
from stages.share_knowledge import share_knowledge
from stages.workspace.paths import Workspace

ADAPTER = "adapter_model.safetensors"


def losses(folder: Path, round: int, name: str) -> np.ndarray:
    found: np.ndarray = load_file(folder / f"exchange/round-{round:04d}/{name}/knowledge.safetensors")["losses"]
    return found


def test_a_run_leaves_what_the_separate_commands_leave(unlike: Path, unlike_folder: Path) -> None:
    workspace = Workspace(unlike_folder)
    for client in (None, 1, 2, 3):
        align_party(workspace, client=client)
    for round in (1, 2):
        for client in (1, 2, 3):
            client_train(workspace, client=client, round=round)
            share_knowledge(workspace, client=client, round=round)
        co_distill(workspace, round=round)
        share_knowledge(workspace, server=True, round=round)
        for client in (1, 2, 3):
            client_distill(workspace, client=client, round=round)
    for path in sorted(unlike.glob("*/**/*.safetensors")):
        assert path.read_bytes() == (unlike_folder / path.relative_to(unlike)).read_bytes(), path


def test_a_teacher_that_reaches_little_is_warned_of_when_the_map_is_made_and_not_again(unlike_folder: Path) -> None:
    edit(unlike_folder / "fedcollm.toml", "top_k = 32", 'top_k = 32\nalignment = "exact"')
    workspace, events = Workspace(unlike_folder), list[Event]()

    def warned() -> list[str]:
        found = [event.text for event in events if "it can teach little" in event.text]
        events.clear()
        return found

    align_party(workspace, client=1, report=events.append)
    waits = "the server's vocabulary is not here yet, so the pair is not measured"
    assert f"{waits}: client-distill does that, or the same command once it has come" in [one.text for one in events]
    assert warned() == []
    align_party(workspace, report=events.append)
    [first, *others] = warned()
    assert first.startswith("client 1: at ")
    assert all(one.startswith("client 1: at ") for one in others)
    align_party(workspace, report=events.append)
    assert warned() == []
    away = shutil.move(unlike_folder / "private/server", unlike_folder / "away")  # as on client 1's own machine
    made = align_party(workspace, client=1, report=events.append)
    assert warned() == [first, *others]
    assert [one.usable < 0.5 for one in made[1].directions if one.usable is not None].count(True) == 1 + len(others)
    shutil.rmtree(unlike_folder / "private/client-1/alignment")
    shutil.move(away, unlike_folder / "private/server")
    align_party(workspace, client=1, report=events.append)
    assert warned() == []  # the server's map is here too, and it has said so


def test_who_has_published_is_told_to_whom_it_goes_if_they_are_elsewhere(unlike_folder: Path) -> None:
    def notes(step: Callable[..., object], **named: object) -> list[str]:
        events: list[Event] = []
        step(Workspace(unlike_folder), report=events.append, **named)
        return [event.text for event in events if " goes to " in event.text]

    assert notes(align_party, client=1) == notes(align_party) == []  # all are here
    for party in ("client-1", "client-3"):
        shutil.rmtree(unlike_folder / "private" / party)
    carry = "carry exchange/ there, or"
    server = "exchange/round-0001/vocabulary-server goes to the clients"
    assert notes(align_party, overwrite=True) == [f"{server}: {carry} `fedcollm pack --server --round 1`"]
    assert notes(align_party) == []  # it is done already
    shutil.rmtree(unlike_folder / "private/server")
    voice = "exchange/round-0001/vocabulary-client-2 goes to the server"
    assert notes(align_party, client=2) == [f"{voice}: {carry} `fedcollm pack --client 2 --round 1`"]
    assert notes(client_train, client=2, round=1) == []  # a client keeps that
    knows = "exchange/round-0001/client-2 goes to the server"
    assert notes(share_knowledge, client=2, round=1) == [f"{knows}: {carry} `fedcollm pack --client 2 --round 1`"]
    (unlike_folder / "machine.toml").write_text("simulation = true\n")
    assert notes(share_knowledge, client=2, round=1, overwrite=True) == []
    (unlike_folder / "machine.toml").unlink()
    edit(unlike_folder / "fedcollm.toml", '"fedmkt"', '"llm2slm"')
    shutil.rmtree(unlike_folder / "exchange/round-0001/vocabulary-server")
    assert notes(align_party, client=2, overwrite=True) == []  # nobody learns from a client


def test_no_adapter_travels_and_what_does_is_of_the_known_kinds(unlike: Path) -> None:
    found = {path.relative_to(unlike / "exchange").as_posix() for path in (unlike / "exchange").rglob("*.*")}
    parties = ["client-1", "client-2", "client-3", "server"]
    expected = {
        f"round-0001/vocabulary-{name}/{file}.safetensors" for name in parties for file in ("vocabulary", "cuts")
    }
    expected |= {f"round-000{round}/{name}/knowledge.safetensors" for round in (1, 2) for name in parties}
    assert found == expected | {f"{Path(path).parent}/manifest.json" for path in expected}


def test_each_client_trains_a_model_of_its_own_with_its_own_lora_shape(unlike: Path) -> None:
    shapes = {}
    for client in (1, 2, 3):
        manifest, _ = read_manifest(unlike / f"private/client-{client}/round-0002/slm")
        shapes[manifest.base.architecture] = manifest.lora.r
        assert {"trained", "server", f"client-{client}"} <= manifest.parents.keys()
    assert shapes == {"gpt2": 4, "llama": 2, "opt": 2}


def test_the_llm_learns_each_row_from_whoever_knows_it_best_and_the_manifest_says_how_many(unlike: Path) -> None:
    manifest, _ = read_manifest(unlike / "private/server/round-0001/llm")
    told = {f"client-{k}": losses(unlike, 1, f"client-{k}") for k in (1, 2, 3)}
    assert sum(manifest.metrics[f"rows_from_{name}"] for name in told) <= 12
    best = np.array(list(told.values())).argmin(axis=0)
    for number, name in enumerate(told):  # an LLM of random weights knows each row worse than a trained client
        assert manifest.metrics[f"rows_from_{name}"] <= (best == number).sum()
    for client in (1, 2, 3):
        learned, _ = read_manifest(unlike / f"private/client-{client}/round-0002/slm")
        better = (losses(unlike, 2, "server") < losses(unlike, 2, f"client-{client}")).sum()
        assert learned.metrics["rows_from_server"] == better


def test_a_round_goes_on_with_what_the_round_before_left(unlike: Path) -> None:
    for client in (1, 2, 3):
        _, digest = read_manifest(unlike / f"private/client-{client}/round-0001/slm")
        assert read_manifest(unlike / f"private/client-{client}/round-0002/trained")[0].parents == {"slm": digest}
    _, omega = read_manifest(unlike / "private/server/round-0001/llm")
    assert read_manifest(unlike / "private/server/round-0002/llm")[0].parents["llm"] == omega
    assert read_manifest(unlike / "exchange/round-0001/server")[0].parents["llm"] == omega


def test_a_client_needs_nothing_of_others_but_what_travels(unlike: Path, tmp_path: Path) -> None:
    alone = tmp_path / "client 2 alone"
    (alone / "models").mkdir(parents=True)
    shutil.copy(unlike / "fedcollm.toml", alone)
    shutil.copytree(unlike / "models/slm-2", alone / "models/slm-2")
    shutil.copytree(unlike / "private/client-2", alone / "private/client-2")
    shutil.rmtree(alone / "private/client-2/round-0002/slm")
    shutil.rmtree(alone / "private/client-2/alignment")
    for place in (
        "round-0001/vocabulary-server",
        "round-0001/vocabulary-client-2",
        "round-0002/server",
        "round-0002/client-2",
    ):
        shutil.copytree(unlike / "exchange" / place, alone / "exchange" / place)
    client_distill(Workspace(alone), client=2, round=2)
    made = "private/client-2/round-0002/slm"
    assert (alone / made / ADAPTER).read_bytes() == (unlike / made / ADAPTER).read_bytes()


# --- selection


NAN = float("nan")


def test_a_difference_of_a_millionth_of_a_nat_decides_and_equality_is_ones_own() -> None:
    own = np.array([2.0, 2.0, 2.0, 2.0, NAN, 2.0])
    told = {"a": np.array([2.0 - 1e-6, 2.0, 2.0 + 1e-6, 1.0, 1.0, NAN]), "b": np.array([3.0, 2.0, 9.0, 1.0, 1.0, 1.9])}
    shares = chosen(own, told, "min-ce")
    assert shares["a"].tolist() == [1, 0, 0, 1, 0, 0]  # of equal ones the first
    assert shares["b"].tolist() == [0, 0, 0, 0, 0, 1]
    both = chosen(own, told, "all")
    assert both["a"].tolist() == [0.5, 0.5, 0.5, 0.5, 0, 0]
    assert both["b"].tolist() == [0.5, 0.5, 0.5, 0.5, 0, 1]
    assert all(share.sum() == 0 for share in chosen(own, told, "none").values())


def test_a_teacher_that_teaches_nothing_is_said_aloud(unlike: Path) -> None:
    edit(unlike / "fedcollm.toml", 'select = "min-ce"', 'select = "none"')
    events: list[Event] = []
    with pytest.raises(Refused):  # made under the agreement before
        co_distill(Workspace(unlike), round=1, report=events.append)
    shutil.rmtree(unlike / "exchange")
    for place in unlike.glob("private/*/round-*"):
        shutil.rmtree(place)
    workspace = Workspace(unlike)
    for client in (None, 1, 2, 3):
        align_party(workspace, client=client)
    for client in (1, 2, 3):
        client_train(workspace, client=client, round=1)
        share_knowledge(workspace, client=client, round=1)
    manifest = co_distill(workspace, round=1, report=events.append)
    assert [e.text for e in events if "nobody teaches the LLM" in e.text]
    assert manifest.metrics["llm_kd_before"] == manifest.metrics["llm_kd_after"] == 0


# --- who may be absent


def test_without_a_client_the_llm_learns_from_the_others_if_that_is_agreed(unlike: Path) -> None:
    workspace = Workspace(unlike)
    for name in ("exchange/round-0001/client-3", "private/server/round-0001/llm"):
        shutil.rmtree(unlike / name)
    with pytest.raises(NotReady, match="2 of 3 clients have told what they know, 3 are needed; absent: client 3"):
        co_distill(workspace, round=1)


def test_with_a_quorum_the_absent_are_named(unlike_folder: Path) -> None:
    toml = unlike_folder / "fedcollm.toml"
    edit(toml, "[evaluation]", "[aggregation]\nmin_clients = 2\n[evaluation]")
    workspace, events = Workspace(unlike_folder), list[Event]()
    for client in (None, 1, 3):
        align_party(workspace, client=client)
    for client in (1, 3):
        client_train(workspace, client=client, round=1)
        share_knowledge(workspace, client=client, round=1)
    manifest = co_distill(workspace, round=1, report=events.append)
    assert "the LLM learns without client 2" in [event.text for event in events]
    assert {"client-1", "client-3"} <= manifest.parents.keys()
    assert "client-2" not in manifest.parents


# --- what is refused


def forge(folder: Path, **changed: np.ndarray) -> None:
    """Knowledge with other numbers, and a manifest that names the new file."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    from builders import sign

    path = folder / "knowledge.safetensors"
    with safe_open(path, framework="numpy") as file:
        told = file.metadata()
    save_file(load_file(path) | changed, path, metadata=told)
    sign(folder)


def without_llm(folder: Path) -> Path:
    shutil.rmtree(folder / "private/server/round-0001/llm")
    return folder / "exchange/round-0001/client-2"


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("losses", lambda x: x * 0.5, "a row's loss is not that of its tokens"),
        ("losses", lambda x: np.where(np.arange(len(x)) == 3, np.nan, x), "holds NaN or infinity"),
        ("losses", lambda x: -x, "a loss is no -log p"),
        ("losses", lambda x: x[:-1], "has other arrays than knowledge of"),
        ("chances", lambda x: x + 9, "likelier than the likeliest"),
        ("chances", lambda x: x * np.nan, "holds NaN or infinity"),
        ("log_probabilities", lambda x: x + 1, "add up to"),
        ("log_probabilities", lambda x: x * np.nan, "holds NaN or infinity"),
        ("tokens", lambda x: x[:, ::-1].copy(), "not in rising order"),
        ("tokens", lambda x: np.repeat(x[:, :1], x.shape[1], axis=1), "not in rising order"),
        ("tokens", lambda x: x + 400, "outside the vocabulary of"),
        ("tokens", lambda x: x - 400, "outside the vocabulary of"),
        ("confidence", lambda x: x + 1, "a confidence is no probability"),
    ],
)
def test_knowledge_that_no_model_can_have_is_refused_by_name(unlike: Path, part: str, change, said: str) -> None:  # type: ignore[no-untyped-def]
    place = without_llm(unlike)
    forge(place, **{part: change(load_file(place / "knowledge.safetensors")[part])})
    with pytest.raises(Problem, match=said) as caught:
        co_distill(Workspace(unlike), round=1)
    assert isinstance(caught.value, Damaged) or "NaN" in said
    assert "client-2" in str(caught.value.where)
    assert not (unlike / "private/server/round-0001/llm").exists()


def test_knowledge_of_another_round_client_or_agreement_is_refused(unlike: Path) -> None:
    place = without_llm(unlike)
    for other, said in (
        ("exchange/round-0002/client-2", "of another round"),
        ("exchange/round-0001/client-3", "client"),
    ):
        shutil.rmtree(place)
        shutil.copytree(unlike / other, place)
        with pytest.raises(Refused, match=said):
            co_distill(Workspace(unlike), round=1)


def test_other_public_rows_are_refused_by_their_digest(unlike: Path) -> None:
    without_llm(unlike)
    place = unlike / "private/server/auxiliary.jsonl"
    before, rows = sha256(place.read_bytes()), place.read_text()
    place.write_text(rows.replace("red", "blue"))
    now = sha256(place.read_bytes())
    with pytest.raises(Refused, match=r"auxiliary.jsonl was changed after the server told") as caught:
        co_distill(Workspace(unlike), round=1)
    assert f"(sha256 {before[:16]}..., here {now[:16]}...)" in caught.value.message
    assert "`fedcollm align --server --overwrite`" in str(caught.value.mend)
    with pytest.raises(Refused, match="changed since: the public rows"):
        align_party(Workspace(unlike))
    with pytest.raises(Refused, match="client 1 has other public rows than this machine") as caught:
        align_party(Workspace(unlike), overwrite=True)
    assert f"(sha256 {before[:16]}..., here {now[:16]}...)" in caught.value.message
    copies = "`sha256sum private/server/auxiliary.jsonl` with that of private/client-1/public.jsonl there"
    assert str(caught.value.mend).startswith(f"compare {copies}")


def test_a_client_whose_model_changed_is_refused(unlike: Path, unlike_models: Path) -> None:
    (unlike / "models").unlink()
    shutil.copytree(unlike_models, unlike / "models")
    shutil.copy(unlike_models / "slm-2/model.safetensors", unlike / "models/slm-2/model.safetensors")
    weights = load_file(unlike / "models/slm-2/model.safetensors")
    from safetensors.numpy import save_file

    save_file(
        {name: value + 1e-3 for name, value in weights.items()},
        unlike / "models/slm-2/model.safetensors",
        metadata={"format": "pt"},
    )
    shutil.rmtree(unlike / "exchange/round-0002/client-2")
    with pytest.raises(Refused, match="the SLM here is not the one of vocabulary-client-2: weights_sha256"):
        share_knowledge(Workspace(unlike), client=2, round=2)


def test_a_vocabulary_of_another_tokenizer_is_refused(unlike: Path) -> None:
    place, other = (
        unlike / "exchange/round-0001/vocabulary-client-2",
        unlike / "exchange/round-0001/vocabulary-client-3",
    )
    without_llm(unlike)
    shutil.copy(other / "vocabulary.safetensors", place)
    with pytest.raises(Damaged, match=r"vocabulary.safetensors has \d+ bytes, its manifest says"):
        co_distill(Workspace(unlike), round=1)


def test_rows_that_do_not_fit_a_client_are_refused_or_left_out_by_that_client_alone(unlike_folder: Path) -> None:
    long = json.dumps({"prompt": "red " * 40, "completion": " blue"}) + "\n"
    for place in unlike_folder.glob("private/*/*.jsonl"):
        if place.name in ("public.jsonl", "auxiliary.jsonl"):
            place.write_text(place.read_text() + long)
    workspace = Workspace(unlike_folder)
    align_party(workspace, client=2)
    with pytest.raises(Damaged, match=r"line 13 of public.jsonl has \d+ tokens"):  # characters: 160 of at most 128
        align_party(workspace, client=1)
    edit(unlike_folder / "fedcollm.toml", "[evaluation]", '[data]\ntoo_long = "skip"\n[evaluation]')
    workspace, events = Workspace(unlike_folder), list[Event]()
    align_party(workspace, client=1, report=events.append)
    assert "1 of 13 public rows are left out: too long, or not given back" in [event.text for event in events]
    client_train(workspace, client=1, round=1)
    share_knowledge(workspace, client=1, round=1)
    found = losses(unlike_folder, 1, "client-1")
    assert np.isnan(found).tolist() == [False] * 12 + [True]


def test_an_unlabelled_public_row_is_left_out_and_counted_and_none_but_such_are_refused(unlike_folder: Path) -> None:
    public = unlike_folder / "private/client-1/public.jsonl"
    public.write_text(public.read_text() + '{"prompt": "red or blue?"}\n')
    events: list[Event] = []
    align_party(Workspace(unlike_folder), client=1, report=events.append)
    assert "1 of 13 public rows are left out: they have no completion to know" in [event.text for event in events]
    public.write_text('{"prompt": "red or blue?"}\n')
    with pytest.raises(UsageProblem, match=r"no row of public.jsonl has a completion"):
        align_party(Workspace(unlike_folder), client=1, overwrite=True)


def test_steps_that_the_method_has_not_are_refused(unlike_folder: Path, workspace_folder_of_fedavg: Path) -> None:
    workspace = Workspace(workspace_folder_of_fedavg)
    for step in (
        lambda: share_knowledge(workspace, client=1, round=1),
        lambda: client_distill(workspace, client=1, round=1),
        lambda: align_party(workspace, client=1),
    ):
        with pytest.raises(UsageProblem, match="method fed"):
            step()
    with pytest.raises(UsageProblem, match="no phases"):
        co_distill(Workspace(unlike_folder), round=1, phase="train")
    with pytest.raises(UsageProblem, match="a client, or the server"):
        share_knowledge(Workspace(unlike_folder), round=1)


@pytest.fixture
def workspace_folder_of_fedavg(tmp_path: Path, base_models: Path) -> Path:
    from builders import make_workspace

    return make_workspace(tmp_path / "another study", base_models)


# --- what it goes with


def test_with_differential_privacy_what_is_told_repeats_the_claim_of_its_adapter(unlike_folder: Path) -> None:
    privacy = "[privacy]\nnoise_multiplier = 1.0\nmax_grad_norm = 1.0\n[evaluation]"
    edit(unlike_folder / "fedcollm.toml", "[evaluation]", privacy)
    workspace = Workspace(unlike_folder)
    align_party(workspace)
    align_party(workspace, client=2)
    client_train(workspace, client=2, round=1)
    told = share_knowledge(workspace, client=2, round=1)
    claim = read_manifest(unlike_folder / "private/client-2/round-0001/trained")[0].privacy
    assert claim is not None
    assert claim.epsilon > 0
    assert told.privacy == claim


@pytest.mark.slow
def test_two_processes_train_the_adapters_of_one(unlike: Path, tmp_path: Path) -> None:
    made = {
        "co-distill": ("private/server/round-0001/llm", []),
        "client-distill": ("private/client-3/round-0001/slm", ["--client", 3]),
    }
    for command, (place, words) in made.items():
        alone = load_file(unlike / place / ADAPTER)
        shutil.rmtree(unlike / place)
        ends = [one.end() for one in start_together(2, command, "--round", 1, *words, "-w", unlike)]
        assert [code for code, _ in ends] == [0, 0], ends
        both = load_file(unlike / place / ADAPTER)
        assert max(np.abs(alone[name] - both[name]).max() for name in alone) < 1e-5


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('method = "fedmkt"', 'method = "fedcollm"', "averages adapters of one model: take out the tables"),
        ("[evaluation]", '[aggregation]\nmode = "secure"\n[evaluation]', "hides what each client tells"),
        ("clients = 3", "clients = 2", "clients.3: there are clients 1 to 2"),
        ('select = "min-ce"', 'select = "min-ce"\norder = "alternating"', "has no turns to take"),
        ("[clients.2.slm.lora]", "[clients.2.slm]\nmodell = 1\n[clients.2.slm.lora]", "Cannot declare"),
        (
            "[clients.2.slm.lora]\nr = 2",
            "[clients.2.slm.lora]\nrr = 2",
            "slm.lora.rr: unknown key; did you mean r?",
        ),
        ("[clients.2.slm]", "[clients.two.slm]", "clients.two"),
    ],
)
def test_an_agreement_that_cannot_be_is_refused_with_the_reason(
    old: str, new: str, said: str, unlike_folder: Path
) -> None:
    edit(unlike_folder / "fedcollm.toml", old, new)
    with pytest.raises(UsageProblem) as caught:
        _ = Workspace(unlike_folder).agreement
    assert said in caught.value.message


@pytest.mark.parametrize("divergence", ["reverse", "jensen-shannon", "spans", "sorted"])
def test_each_divergence_teaches(divergence: str, unlike_folder: Path) -> None:
    edit(unlike_folder / "fedcollm.toml", 'select = "min-ce"', f'select = "all"\ndivergence = "{divergence}"')
    edit(
        unlike_folder / "fedcollm.toml", "lambda_llm = 1.0", "lambda_llm = 100.0"
    )  # beside the answers, which pull too
    workspace = Workspace(unlike_folder)
    for client in (None, 1, 2, 3):
        align_party(workspace, client=client)
    for client in (1, 2, 3):
        client_train(workspace, client=client, round=1)
        share_knowledge(workspace, client=client, round=1)
    metrics = co_distill(workspace, round=1).metrics
    assert metrics["llm_kd_before"] > 0
    assert metrics["llm_kd_after"] < metrics["llm_kd_before"]
