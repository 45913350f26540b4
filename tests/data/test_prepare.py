"""prepare: a public dataset becomes the parties' rows, each in one place, by the prompts that lm-eval scores."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import COLOURS, Outcome, edit, published, write_rows
from stages.data.prepare import prepare
from stages.workspace.paths import Workspace

PARTIES = ("client-1", "client-2", "client-3", "server")


def question(number: int) -> dict[str, Any]:
    """Unlike any other; one in two is red, the rest half blue and half green."""
    return {"question": f"number {number} ?", "choices": list(COLOURS), "answer": (0, 1, 0, 2)[number % 4]}


def write_questions(path: Path, numbers: list[int]) -> None:
    path.write_text("".join(json.dumps(question(number)) + "\n" for number in numbers))


def with_data(folder: Path, lines: str) -> Workspace:
    toml = folder / "fedcollm.toml"
    toml.write_text(f"{toml.read_text()}\n[data]\n{lines}\n")
    return Workspace(folder)


@pytest.fixture
def bare(workspace_folder: Path) -> Path:
    """A workspace without any party's data, and a task of 40 training and 10 test questions."""
    for path in [*workspace_folder.glob("private/*/train.jsonl"), workspace_folder / "private/server/auxiliary.jsonl"]:
        path.unlink()
    write_questions(workspace_folder / "data/train.jsonl", list(range(40)))
    write_questions(workspace_folder / "data/test.jsonl", list(range(100, 110)))
    return workspace_folder


def dealt(folder: Path) -> dict[str, list[dict[str, str]]]:
    """What each party has got."""
    files = {party: "auxiliary.jsonl" if party == "server" else "train.jsonl" for party in PARTIES}
    return {
        party: [json.loads(line) for line in (folder / "private" / party / name).read_text().splitlines()]
        for party, name in files.items()
    }


def test_every_row_lands_in_one_place_and_none_is_lost(bare: Path) -> None:
    summary = prepare(with_data(bare, 'tasks = ["colours"]'))
    found = Counter((row["prompt"], row["completion"]) for rows in dealt(bare).values() for row in rows)
    made = [question(number) for number in range(40)]
    assert found == Counter((q["question"], f" {COLOURS[q['answer']]}") for q in made)
    assert summary["rows"] == 40
    assert summary["duplicates_dropped"] == 0
    # Uniform shares of 1/(K+1): 40 rows for four parties.
    assert {party: len(rows) for party, rows in dealt(bare).items()} == dict.fromkeys(PARTIES, 10)


def test_rows_that_occur_twice_are_used_once_and_counted(bare: Path) -> None:
    write_questions(bare / "data/train.jsonl", [*range(40), *range(5), 0])
    summary = prepare(with_data(bare, 'tasks = ["colours"]'))
    assert summary["rows"] == 46
    assert summary["duplicates_dropped"] == 6
    prompts = [row["prompt"] for rows in dealt(bare).values() for row in rows]
    assert len(prompts) == len(set(prompts)) == 40


def test_prompts_that_are_also_in_test_are_counted_and_kept(bare: Path) -> None:
    write_questions(bare / "data/test.jsonl", [3, 7, 7, 100])
    summary = prepare(with_data(bare, 'tasks = ["colours"]'))
    assert summary["also_in_test"] == 2
    assert sum(len(rows) for rows in dealt(bare).values()) == 40


def test_the_histogram_of_labels_is_what_each_party_has(bare: Path) -> None:
    summary = prepare(with_data(bare, 'tasks = ["colours"]\nsplit = "dirichlet"'))
    for party, rows in dealt(bare).items():
        stated = summary["parties"][party]
        # A label is the index of the right choice.
        assert stated["labels"] == Counter(str(COLOURS.index(row["completion"].strip())) for row in rows)
        assert stated["rows"] == len(rows) == sum(stated["labels"].values())
        assert stated["sources"] == {"colours": len(rows)}
    totals = sum((Counter(party["labels"]) for party in summary["parties"].values()), Counter())
    assert totals == {"0": 20, "1": 10, "2": 10}
    assert json.loads((bare / "private/split.json").read_text()) == summary


def test_a_small_alpha_makes_clients_one_sided(bare: Path) -> None:
    write_questions(bare / "data/train.jsonl", list(range(400)))
    spreads = {}
    for alpha in (0.1, 1000.0):
        toml = (bare / "fedcollm.toml").read_text()
        lines = f'tasks = ["colours"]\nsplit = "dirichlet"\ndirichlet_alpha = {alpha}'
        labels = [party["labels"] for party in prepare(with_data(bare, lines), overwrite=True)["parties"].values()][:3]
        (bare / "fedcollm.toml").write_text(toml)
        shares = [[counts.get(label, 0) for counts in labels] for label in "012"]
        spreads[alpha] = sum(max(share) - min(share) for share in shares)
    # About 300 rows for three clients. At a large alpha each has a third of every label, 150 of label 0 among them; at
    # a small one most of a label goes to one client.
    assert spreads[1000.0] < 30
    assert spreads[0.1] > 100


def test_by_task_gives_whole_sources_to_clients(bare: Path) -> None:
    rows = [{"prompt": f"Q {i}", "completion": " red", "source": ("a", "b", "c")[i % 3]} for i in range(30)]
    write_rows(bare / "pool.jsonl", rows)
    summary = prepare(with_data(bare, 'files = ["pool.jsonl"]\nsplit = "by-task"\nauxiliary_share = 0.2'))
    assert [list(summary["parties"][f"client-{k}"]["sources"]) for k in (1, 2, 3)] == [["a"], ["b"], ["c"]]
    assert summary["parties"]["server"]["rows"] == 6  # a fifth of 30


@pytest.mark.parametrize(("lines", "public", "left_out"), [("", 10, None), ("auxiliary_share = 0.6", 6, 4)])
def test_whole_sources_are_the_servers_and_no_clients(
    lines: str, public: int, left_out: int | None, bare: Path, fedcollm: Callable[..., Outcome]
) -> None:
    rows = [{"prompt": f"Q {i}", "completion": " red", "source": ("a", "b", "c")[i % 3]} for i in range(30)]
    write_rows(bare / "pool.jsonl", rows)
    with_data(bare, f'files = ["pool.jsonl"]\nauxiliary_sources = ["c"]\n{lines}')
    outcome = fedcollm("prepare", "-w", bare, "--json")
    assert outcome.code == 0, outcome.err
    parties = json.loads(outcome.out)["parties"]
    assert parties["server"]["sources"] == {"c": public}
    theirs = sum((Counter(parties[f"client-{k}"]["sources"]) for k in (1, 2, 3)), Counter[str]())
    assert theirs == {"a": 10, "b": 10}
    assert json.loads((bare / "private/split.json").read_text()).get("left_out") == left_out
    assert (f"{left_out} rows of data.auxiliary_sources are left out" in outcome.err) == (left_out is not None)


@pytest.mark.parametrize("files", ['"public.jsonl", "own.jsonl"', '"own.jsonl", "public.jsonl"'])
def test_a_row_that_is_also_of_an_auxiliary_source_is_no_clients_in_whatever_order_files_are_named(
    files: str, bare: Path
) -> None:
    public = [{"prompt": f"public {i}", "completion": " red"} for i in range(8)]
    own = [{"prompt": f"own {i}", "completion": " red"} for i in range(12)]
    write_rows(bare / "public.jsonl", public)
    write_rows(bare / "own.jsonl", [*public[:5], *own])
    summary = prepare(with_data(bare, f'files = [{files}]\nauxiliary_sources = ["public"]'))
    assert summary["duplicates_dropped"] == 5
    assert summary["parties"]["server"]["sources"] == {"public": 8}
    prompts = {party: {row["prompt"] for row in rows} for party, rows in dealt(bare).items()}
    assert prompts.pop("server") == {row["prompt"] for row in public}
    assert set().union(*prompts.values()) == {row["prompt"] for row in own}


def test_an_auxiliary_source_all_of_whose_rows_occur_elsewhere_is_one(bare: Path) -> None:
    write_rows(bare / "few.jsonl", [{"prompt": f"Q {i}", "completion": " red"} for i in range(5)])
    write_rows(bare / "many.jsonl", [{"prompt": f"Q {i}", "completion": " red"} for i in range(20)])
    summary = prepare(with_data(bare, 'files = ["few.jsonl", "many.jsonl"]\nauxiliary_sources = ["few"]'))
    assert summary["parties"]["server"]["sources"] == {"few": 5}
    assert sum(summary["parties"][f"client-{k}"]["rows"] for k in (1, 2, 3)) == 15


@pytest.mark.parametrize(
    ("lines", "mend"),
    [
        ("auxiliary_share = 0.001", "use more data or a larger data.auxiliary_share"),
        ('auxiliary_sources = ["colours"]', "leave the clients rows that are in no source of data.auxiliary_sources"),
        ("auxiliary_share = 0.999", "a smaller data.auxiliary_share"),
        ('split = "dirichlet"\ndirichlet_alpha = 1e-5', "a larger dirichlet_alpha"),
    ],
)
def test_a_party_without_rows_is_told_by_the_setting_that_leaves_it_without(
    lines: str, mend: str, bare: Path, fedcollm: Callable[..., Outcome]
) -> None:
    with_data(bare, f'tasks = ["colours"]\n{lines}')
    outcome = fedcollm("prepare", "-w", bare)
    assert outcome.code == 2
    assert mend in outcome.err.partition("mend  ")[2].replace("\n", " ")


def test_jsonl_files_are_a_source_too_named_after_the_file(bare: Path) -> None:
    for name in ("one", "two"):
        write_rows(bare / f"{name}.jsonl", [{"prompt": f"{name} {i}", "completion": " red"} for i in range(20)])
    summary = prepare(with_data(bare, 'files = ["one.jsonl", "two.jsonl"]'))
    sources = sum((Counter(party["sources"]) for party in summary["parties"].values()), Counter())
    assert sources == {"one": 20, "two": 20}
    assert set(dealt(bare)["server"][0]) == {"prompt", "completion"}  # label and source stay behind


def test_the_split_is_drawn_from_the_federations_seed_alone(bare: Path) -> None:
    prepare(with_data(bare, 'tasks = ["colours"]'))
    before = dealt(bare)
    prepare(Workspace(bare), overwrite=True)
    assert dealt(bare) == before
    toml = bare / "fedcollm.toml"
    toml.write_text(toml.read_text().replace("seed = 7", "seed = 8"))
    prepare(Workspace(bare), overwrite=True)
    assert dealt(bare) != before


def test_prepare_given_again_is_already_done(bare: Path, fedcollm: Callable[..., Outcome]) -> None:
    with_data(bare, 'tasks = ["colours"]')
    first = fedcollm("prepare", "-w", bare)
    assert first.code == 0
    assert "client-3" in first.out
    before = {name: (bare / name).stat().st_mtime_ns for name in published(bare)}
    again = fedcollm("prepare", "-w", bare)
    assert again.code == 0
    assert "already done" in again.err
    assert again.out == first.out
    assert {name: (bare / name).stat().st_mtime_ns for name in published(bare)} == before


def test_data_of_someones_own_is_never_replaced_without_overwrite(bare: Path, fedcollm: Callable[..., Outcome]) -> None:
    with_data(bare, 'tasks = ["colours"]')
    own = write_rows(bare / "private/client-2/train.jsonl", [{"prompt": "mine", "completion": " red"}])
    before = published(bare)
    outcome = fedcollm("prepare", "-w", bare)
    assert outcome.code == 5
    assert "private/client-2/train.jsonl is there already and is not what prepare would write" in outcome.err
    assert "--overwrite" in outcome.err
    assert published(bare) == before
    assert fedcollm("prepare", "--overwrite", "-w", bare).code == 0
    assert "mine" not in own.read_text()


@pytest.mark.parametrize(
    ("lines", "code", "told"),
    [
        ("", 2, "prepare needs exactly one of data.tasks and data.files"),
        ('tasks = ["colours"]\nfiles = ["pool.jsonl"]', 2, "prepare needs exactly one of data.tasks and data.files"),
        ('files = ["pool.jsonl"]', 3, "the data file pool.jsonl is not there"),
        ('tasks = ["colours"]\nauxiliary_share = 0.001', 2, "leaves the server (auxiliary) without rows (40 rows"),
        (
            'tasks = ["colours"]\nheld_out_share = 0.01',
            2,
            "held_out_share 0.01 of the server's 10 rows leaves none to hold",
        ),
        (
            'tasks = ["colours"]\nheld_out_share = 0.99',
            2,
            "held_out_share 0.99 of the server's 10 rows leaves none to tra",
        ),
        ('tasks = ["colours"]\nsplit = "by-task"\nauxiliary_share = 0.99', 2, "this split leaves client "),
        ('tasks = ["colours"]\nauxiliary_sources = ["colour"]', 2, "names 'colour', which no row is of"),
        ('tasks = ["colours"]\nauxiliary_sources = ["colours"]', 2, "this split leaves client 1, client 2, client 3 "),
    ],
)
def test_what_cannot_be_split_is_said(
    lines: str, code: int, told: str, bare: Path, fedcollm: Callable[..., Outcome]
) -> None:
    with_data(bare, lines)
    outcome = fedcollm("prepare", "-w", bare)
    assert outcome.code == code
    assert told in outcome.err
    assert "mend  " in outcome.err
    assert published(bare) == {}


@pytest.mark.parametrize(("share", "unlabelled"), [(0.0, 0), (0.3, 3), (0.9, 9)])
def test_that_share_of_the_auxiliary_rows_and_of_no_others_loses_its_answers(
    share: float, unlabelled: int, bare: Path
) -> None:
    prepare(with_data(bare, 'tasks = ["colours"]'))
    before = dealt(bare)
    toml = bare / "fedcollm.toml"
    toml.write_text(f"{toml.read_text()}unlabelled_share = {share}\n")  # [data] stands last
    summary = prepare(Workspace(bare), overwrite=True)
    after = dealt(bare)
    assert {party: after[party] for party in PARTIES[:3]} == {party: before[party] for party in PARTIES[:3]}
    assert [row["prompt"] for row in after["server"]] == [row["prompt"] for row in before["server"]]
    assert sum(set(row) == {"prompt"} for row in after["server"]) == unlabelled  # of ten
    assert all(row in before["server"] for row in after["server"] if "completion" in row)
    assert summary["auxiliary"] == {"labelled": 10 - unlabelled, "unlabelled": unlabelled}
    assert summary["parties"]["server"]["labels"].get("", 0) == unlabelled
    assert summary["parties"]["server"]["rows"] == 10


def test_the_table_tells_of_unlabelled_rows(bare: Path, fedcollm: Callable[..., Outcome]) -> None:
    with_data(bare, 'tasks = ["colours"]\nunlabelled_share = 0.3')
    assert "3 of the server's rows are unlabelled" in " ".join(fedcollm("prepare", "-w", bare).out.split())


def test_which_answers_are_taken_is_drawn_from_the_federations_seed(bare: Path) -> None:
    write_questions(bare / "data/train.jsonl", list(range(200)))
    prepare(with_data(bare, 'tasks = ["colours"]\nunlabelled_share = 0.5'))
    places = {7: [len(row) for row in dealt(bare)["server"]]}
    prepare(Workspace(bare), overwrite=True)
    assert [len(row) for row in dealt(bare)["server"]] == places[7]
    edit(bare / "fedcollm.toml", "seed = 7", "seed = 8")
    prepare(Workspace(bare), overwrite=True)
    assert [len(row) for row in dealt(bare)["server"]] != places[7]
    assert sum(places[7]) == 50 + 25  # of fifty rows every second has a completion


def test_held_out_rows_are_taken_from_the_servers_and_lie_in_no_other_place(bare: Path) -> None:
    prepare(with_data(bare, 'tasks = ["colours"]'))
    before = dealt(bare)
    toml = bare / "fedcollm.toml"
    toml.write_text(f"{toml.read_text()}held_out_share = 0.3\nunlabelled_share = 0.5\n")  # [data] stands last
    summary = prepare(Workspace(bare), overwrite=True)
    after = dealt(bare)
    held_out = [json.loads(line) for line in (bare / "private/server/held-out.jsonl").read_text().splitlines()]
    assert {party: after[party] for party in PARTIES[:3]} == {party: before[party] for party in PARTIES[:3]}
    assert len(held_out) == 3  # of ten
    assert all(row in before["server"] for row in held_out)  # with their answers
    prompts = [row["prompt"] for row in [*after["server"], *held_out]]
    assert sorted(prompts) == sorted(row["prompt"] for row in before["server"])
    assert summary["held_out"]["rows"] == 3
    digest = hashlib.sha256((bare / "private/server/held-out.jsonl").read_bytes()).hexdigest()
    assert json.loads((bare / "private/split.json").read_text())["held_out"]["sha256"] == digest


def test_the_table_tells_of_held_out_rows(bare: Path, fedcollm: Callable[..., Outcome]) -> None:
    with_data(bare, 'tasks = ["colours"]\nheld_out_share = 0.3')
    assert "3 more are held out for the gate" in " ".join(fedcollm("prepare", "-w", bare).out.split())


def test_of_each_client_so_many_rows_are_kept_drawn_by_the_seed_and_the_servers_stay(bare: Path) -> None:
    workspace = with_data(bare, 'tasks = ["colours"]\nsplit = "dirichlet"')
    prepare(workspace)
    whole = dealt(bare)
    edit(bare / "fedcollm.toml", 'split = "dirichlet"', 'split = "dirichlet"\nlimit = 5')
    summary = prepare(Workspace(bare), overwrite=True)
    found = dealt(bare)
    assert found["server"] == whole["server"]
    for k in (1, 2, 3):
        mine, before = found[f"client-{k}"], whole[f"client-{k}"]
        assert len(mine) == min(5, len(before))
        assert mine == [row for row in before if row in mine]
    assert any(found[f"client-{k}"] != whole[f"client-{k}"][:5] for k in (1, 2, 3))
    assert summary["beyond_limit"] == 30 - sum(len(found[f"client-{k}"]) for k in (1, 2, 3)) > 0
    prepare(Workspace(bare), overwrite=True)
    assert dealt(bare) == found


def test_nothing_is_invented_on_a_machine_of_one_party(bare: Path, fedcollm: Callable[..., Outcome]) -> None:
    with_data(bare, 'tasks = ["colours"]')
    assert fedcollm("keys", "--client", "2", "-w", bare).code == 0
    for words in ([], ["--overwrite"]):
        outcome = fedcollm("prepare", *words, "-w", bare)
        assert outcome.code == 5
        assert "the keys of client 2 are here, and not those of all" in outcome.err
    assert not list(bare.glob("private/*/*.jsonl"))
    (bare / "machine.toml").write_text("simulation = true\n")
    assert fedcollm("prepare", "-w", bare).code == 0


def test_nothing_is_invented_where_only_a_round_of_others_has_arrived(
    bare: Path, fedcollm: Callable[..., Outcome]
) -> None:
    with_data(bare, 'tasks = ["colours"]')
    assert fedcollm("broadcast", "--round", "1", "-w", bare).code == 0
    outcome = fedcollm("prepare", "-w", bare)
    assert outcome.code == 5
    assert "a round of a federation is here, and nobody's rows" in outcome.err
    assert "set simulation = true in machine.toml" in outcome.err
