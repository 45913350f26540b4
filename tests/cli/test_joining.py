"""A party's own folder: from an agreement, and from an invitation, which may be anything that somebody has sent."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import AGREEMENT, TASK, Outcome, contents, drafts, edit, make_workspace, rows, write_rows
from stages.exchange.bundles import bundle_bytes, read_bundle
from stages.exchange.invites import LARGEST_INVITE_BYTES
from stages.files.reading import json_bytes, sha256
from stages.parties.roster import fingerprint

Fedcollm = Callable[..., Outcome]
INVITED = {".gitignore", "README.md", "fedcollm.toml", "machine.toml", "private", "tasks"}


@pytest.fixture
def organiser(tmp_path: Path, base_models: Path) -> Path:
    return make_workspace(tmp_path / "organiser", base_models)


@pytest.fixture
def invite(organiser: Path, tmp_path: Path, fedcollm: Fedcollm) -> Path:
    path = tmp_path / "invite.fedcollm"
    outcome = fedcollm("pack", "--invite", "--client", 2, "--output", path, "-w", organiser)
    assert outcome.code == 0, outcome.err
    return path


@pytest.fixture
def refused(tmp_path: Path, fedcollm: Fedcollm) -> Callable[..., str]:
    """refused(5, "--invite", path): what is said; nothing is made, not even in part."""

    def call(code: int, *words: object, folder: Path | None = None) -> str:
        place = folder or tmp_path / "new"
        before = sorted(place.rglob("*")) if place.exists() else None
        outcome = fedcollm("init", place, *words)
        assert outcome.code == code, outcome.err + outcome.out
        assert "Traceback" not in outcome.err
        assert "\n  mend  " in outcome.err
        assert outcome.out == ""
        assert (sorted(place.rglob("*")) if place.exists() else None) == before
        assert drafts(tmp_path) == []
        return outcome.err

    return call


# --- from an agreement


def test_a_party_s_folder_has_the_agreement_byte_for_byte_and_what_this_party_needs(
    organiser: Path, tmp_path: Path, fedcollm: Fedcollm
) -> None:
    agreement = organiser / "fedcollm.toml"
    agreement.write_bytes(agreement.read_bytes().replace(b"\n", b"\r\n") + b"# \xc3\xa9\r\n")
    outcome = fedcollm("init", tmp_path / "two", "--agreement", agreement, "--client", 2, "--json")
    assert outcome.code == 0, outcome.err
    said = json.loads(outcome.out)
    digest = sha256(agreement.read_bytes())
    assert said["agreement_sha256"] == digest
    assert said["agreed"]["sha256 of the agreement"] == f"{digest[:16]}: {digest}"
    assert (said["party"], said["rows"], said["fingerprint"]) == ("client-2", ["private/client-2/train.jsonl"], None)
    assert said["missing"] == [
        {
            "what": "questions: data/train.jsonl, data/test.jsonl",
            "mend": "only to score: have the organiser send them",
        }
    ]
    two = tmp_path / "two"
    assert {path.name for path in two.iterdir()} == INVITED
    assert (two / "fedcollm.toml").read_bytes() == agreement.read_bytes()
    assert contents(two / "tasks") == contents(organiser / "tasks")
    assert "/private/" in (two / ".gitignore").read_text().splitlines()
    assert (two / "private/client-2").stat().st_mode & 0o777 == 0o700
    machine = (two / "machine.toml").read_text()
    assert tomllib.loads(machine)["simulation"] is False
    assert "# slm = " in machine
    assert not any(word in machine for word in ("llm = ", "[slurm]", "offload_idle", "home = ", "models.clients"))


def test_the_server_s_folder_is_the_server_s(organiser: Path, tmp_path: Path, fedcollm: Fedcollm) -> None:
    folder = tmp_path / "server"
    assert fedcollm("init", folder, "--agreement", organiser / "fedcollm.toml", "--server").code == 0
    assert [path.name for path in (folder / "private").iterdir()] == ["server"]
    assert "# llm = " in (folder / "machine.toml").read_text()
    page = (folder / "README.md").read_text()
    assert "fedcollm next --server\n" in page
    assert "private/server/auxiliary.jsonl" in page
    assert "--client" not in page
    waits = fedcollm("next", "--server", "-w", folder)
    assert (waits.code, "in private/server/auxiliary.jsonl" in waits.err) == (3, True)


def test_a_client_of_fedmkt_is_told_of_its_public_rows_and_its_own_model(tmp_path: Path, fedcollm: Fedcollm) -> None:
    agreement = tmp_path / "fedcollm.toml"
    text = AGREEMENT.replace("seed = 7", 'seed = 7\nmethod = "fedmkt"').replace('["colours"]', "[]")
    agreement.write_text(f'{text}\n[clients.3.slm]\nmodel = "acme/opt|\\u001b[31m`x`"\n')
    made = fedcollm("init", tmp_path / "three", "--agreement", agreement, "--client", 3)
    assert made.code == 0, made.err
    page, machine = ((tmp_path / "three" / name).read_text() for name in ("README.md", "machine.toml"))
    assert "`private/client-3/train.jsonl`, `private/client-3/public.jsonl`" in page
    assert "fedcollm share-knowledge --client 3 --round 1" in page
    assert "acme/opt\\|\\\\x1b\\[31m\\`x\\`" in page  # as text, and nothing that a page obeys
    assert "\x1b" not in page + made.out
    assert '#   3 = "/models/opt-1.3b"' in machine


def test_what_a_party_is_told_to_do_next_is_its_own(organiser: Path, tmp_path: Path, fedcollm: Fedcollm) -> None:
    folder = tmp_path / "two"
    assert fedcollm("init", folder, "--agreement", organiser / "fedcollm.toml", "--client", 2).code == 0
    assert "waiting for data of client-2: JSONL rows of its own, in private/client-2/train.jsonl" in (
        fedcollm("status", "-w", folder).out
    )
    assert fedcollm("prepare", "-w", folder).code == 5
    write_rows(folder / "private/client-2/train.jsonl", rows(4))
    waits = fedcollm("next", "--client", 2, "-w", folder)
    assert (waits.code, "the broadcast of round 1, in exchange/" in waits.err) == (3, True)


@pytest.mark.parametrize(
    ("words", "place", "needs_llm"),
    [(("--client", 2), "private/client-2/train.jsonl", False), (("--server",), "private/server/auxiliary.jsonl", True)],
)
def test_plan_tells_a_party_what_it_lacks_itself(
    words: tuple[object, ...], place: str, needs_llm: bool, organiser: Path, tmp_path: Path, fedcollm: Fedcollm
) -> None:
    folder = tmp_path / "joined"
    assert fedcollm("init", folder, "--agreement", organiser / "fedcollm.toml", *words).code == 0
    said = " ".join(fedcollm("plan", "-w", folder).out.split())
    assert f"missing here: training data mend put JSONL rows into {place}" in said
    assert "simulation" not in said
    assert ("missing here: the LLM" in said) == needs_llm


def test_a_task_that_has_not_come_is_named_with_its_mend(organiser: Path, tmp_path: Path, fedcollm: Fedcollm) -> None:
    shutil.rmtree(organiser / "tasks")
    made = fedcollm("init", tmp_path / "two", "--agreement", organiser / "fedcollm.toml", "--client", 2)
    assert made.code == 0, made.err
    assert (
        "missing: tasks/: no file there defines colours, nor does lm-eval; copy tasks/ from the organiser" in made.out
    )


def test_an_empty_folder_that_is_there_is_taken(organiser: Path, tmp_path: Path, fedcollm: Fedcollm) -> None:
    (tmp_path / "two").mkdir()
    assert fedcollm("init", tmp_path / "two", "--agreement", organiser / "fedcollm.toml", "--client", 2).code == 0
    assert (tmp_path / "two/machine.toml").exists()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--client", 9), 2, "there is no client 9: the agreement has clients 1 to 3"),
        ((), 2, "which party is this? give --client or --server"),
        (("--client", 2, "--server"), 2, "--client and --server exclude each other"),
        (("--client", 2, "--rounds", 5), 2, "--rounds is for a new agreement, and here is one"),
        (("--client", 2, "--set", "federation.rounds=3"), 2, "--set is for a new agreement"),
        (("--client", 2, "--template", "blank"), 2, "--template is for a new agreement"),
        (("--client", 2, "--fingerprint", "AAAA"), 2, "--fingerprint is of an invitation"),
    ],
)
def test_words_that_do_not_fit_an_agreement_are_refused(
    words: tuple[object, ...], code: int, told: str, organiser: Path, refused: Callable[..., str]
) -> None:
    assert told in refused(code, "--agreement", organiser / "fedcollm.toml", *words)


def test_a_party_needs_a_source(refused: Callable[..., str]) -> None:
    assert "made from one thing: --agreement or --invite" in refused(2, "--client", 2)
    assert "made from one thing" in refused(2, "--agreement", "x", "--invite", "y")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"[federation\n", "not valid TOML"),
        (b"\xff\xfe", "not UTF-8"),
        (b"a = " + b"[" * 20_000, "not valid TOML"),
        (b"a = " + b"1" * 20_000, "not valid TOML"),
        (AGREEMENT.replace("rounds = 2", "rounds = 0").encode(), "federation.rounds"),
        (AGREEMENT.encode() + b"\n[" + b"k" * 5000 + b"]\n", "unknown key"),
        (b"\n".join(b"k%d = 1" % k for k in range(20_000)), "and 199"),
    ],
)
def test_an_agreement_that_is_none_is_refused_in_few_words(
    text: bytes, told: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "agreed.toml").write_bytes(text)
    said = refused(2, "--agreement", tmp_path / "agreed.toml", "--client", 1)
    assert told in said
    assert len(said) < 12_000


def test_a_folder_that_is_not_free_is_refused(organiser: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    agreement = ("--agreement", organiser / "fedcollm.toml", "--client", 2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    assert "the folder full is not empty" in refused(5, *agreement, folder=tmp_path / "full")
    assert (tmp_path / "full/notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    assert "file is there, and is no folder" in refused(5, *agreement, folder=tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "link is there, and is no folder" in refused(5, *agreement, folder=tmp_path / "link")
    assert "would lie inside another workspace" in refused(5, *agreement, folder=organiser / "two")
    (tmp_path / "fedcollm.toml").write_text("")
    assert "would lie inside another workspace" in refused(5, *agreement, folder=tmp_path / "two")
    (tmp_path / "fedcollm.toml").unlink()
    assert "agreed.toml is not there" in refused(3, "--agreement", tmp_path / "agreed.toml", "--client", 2)


# --- an invitation


def test_an_invitation_has_all_that_a_party_needs(
    invite: Path, organiser: Path, tmp_path: Path, fedcollm: Fedcollm
) -> None:
    again = fedcollm("pack", "--invite", "--client", 2, "--output", invite, "--json", "-w", organiser)
    said = json.loads(again.out)
    shown = fingerprint(invite.read_bytes())
    assert (said["fingerprint"], said["sha256"]) == (shown, sha256(invite.read_bytes()))
    bundle = read_bundle(invite)
    assert [*bundle.members] == ["fedcollm.toml", "invite.json", "task-0001"]
    told = json.loads(bundle.members["invite.json"])
    assert (told["client"], told["extras"], told["tasks"], told["parties"]) == (2, [], ["colours.yaml"], [])
    [model] = told["models"]
    weights = sha256((organiser / "models/slm/model.safetensors").read_bytes())
    assert (model["role"], model["name"]) == ("slm", "models/slm")
    assert model["files"]["model.safetensors"] == weights

    made = fedcollm("init", tmp_path / "two", "--invite", invite, "--fingerprint", shown.lower().replace("-", " "))
    assert made.code == 0, made.err
    assert f"{shown}, as it was read out" in made.out
    assert "warning" not in made.out
    two = tmp_path / "two"
    assert {path.name for path in two.iterdir()} == INVITED
    assert (two / "fedcollm.toml").read_bytes() == (organiser / "fedcollm.toml").read_bytes()
    assert contents(two / "tasks") == contents(organiser / "tasks")
    assert f"{weights}  model.safetensors" in (two / "README.md").read_text()
    assert "# tiny: client 2\n" in (two / "README.md").read_text()


def test_without_a_fingerprint_it_is_shown_with_a_warning(invite: Path, tmp_path: Path, fedcollm: Fedcollm) -> None:
    made = fedcollm("init", tmp_path / "two", "--invite", invite)
    assert made.code == 0
    assert fingerprint(invite.read_bytes()) in made.out
    assert "warning: have the organiser read out this fingerprint" in made.out


def test_an_invitation_of_an_encrypted_private_quantized_federation_says_what_to_install(
    organiser: Path, tmp_path: Path, fedcollm: Fedcollm
) -> None:
    agreement = organiser / "fedcollm.toml"
    edit(agreement, '[slm]\nmodel = "models/slm"', '[slm]\nquantization = "4bit"\nmodel = "models/slm"')
    with agreement.open("a") as file:
        file.write('\n[aggregation]\nmode = "encrypted"\n')
    (organiser / "evaluation.toml").write_text('tasks = ["colours"]\nlimit = 5\n')
    path = tmp_path / "x.fedcollm"
    done = fedcollm("pack", "--invite", "--client", 1, "--output", path, "-w", organiser)
    assert done.code == 0, done.err
    assert json.loads(read_bundle(path).members["invite.json"])["extras"] == ["he", "quant"]
    assert fedcollm("init", tmp_path / "one", "--invite", path).code == 0
    assert (tmp_path / "one/evaluation.toml").read_text() == 'tasks = ["colours"]\nlimit = 5\n'
    page = (tmp_path / "one/README.md").read_text()
    assert "Install `fedcollm[he,quant]`, version" in page
    assert "fedcollm join --client 1 --fingerprint FINGERPRINT" in page


def test_an_invitation_names_the_keys_that_the_organiser_has(
    secure: Callable[[str], Path], tmp_path: Path, fedcollm: Fedcollm
) -> None:
    folder, path = secure("opened"), tmp_path / "x.fedcollm"
    assert fedcollm("pack", "--invite", "--client", 1, "--output", path, "-w", folder).code == 0
    told = json.loads(read_bundle(path).members["invite.json"])
    roster = json.loads((folder / "exchange/federation.json").read_text())
    assert told["roster"] == fingerprint((folder / "exchange/federation.json").read_bytes())
    keys = {"server": roster["server"]["ed25519"]} | {f"client-{m['client']}": m["ed25519"] for m in roster["clients"]}
    assert {one["party"]: one["key"] for one in told["parties"]} == {
        party: fingerprint(bytes.fromhex(key)) for party, key in keys.items()
    }
    assert fedcollm("init", tmp_path / "one", "--invite", path).code == 0
    assert told["roster"] in (tmp_path / "one/README.md").read_text()


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("colours.yaml", TASK + "process_docs: !function utils.run\n", "would run code: !function utils.run"),
        ("colours.yaml", TASK + "class: !function utils.Task\n", "would run code"),
        ("utils.py", "import os\n", "tasks/utils.py does not travel in an invitation"),
        (".hidden.yaml", TASK, "tasks/.hidden.yaml does not travel"),
        ("big.json", " " * (5 << 20), "has more than 4194304 bytes"),
    ],
)
def test_tasks_that_are_not_data_are_not_packed(
    name: str, text: str, told: str, organiser: Path, tmp_path: Path, fedcollm: Fedcollm
) -> None:
    (organiser / "tasks" / name).write_text(text)
    with (organiser / "machine.toml").open("a") as file:
        file.write("run_task_code = true\n")
    done = fedcollm("pack", "--invite", "--client", 2, "--output", tmp_path / "x", "-w", organiser)
    assert (done.code, told in done.err) == (5, True), done.err
    assert not (tmp_path / "x").exists()


def test_a_task_that_is_nowhere_is_told_before_it_is_packed(
    organiser: Path, tmp_path: Path, fedcollm: Fedcollm
) -> None:
    (organiser / "tasks/colours.yaml").rename(organiser / "colours.yaml")
    done = fedcollm("pack", "--invite", "--client", 2, "--output", tmp_path / "x", "-w", organiser)
    assert (done.code, "no task named 'colours', here or in lm-eval" in done.err) == (2, True)


@pytest.mark.parametrize(
    "words", [(), ("--client", 2, "--server"), ("--client", 2, "--round", 1), ("--client", 2, "--keys")]
)
def test_an_invitation_is_for_one_party_alone(words: tuple[object, ...], organiser: Path, fedcollm: Fedcollm) -> None:
    done = fedcollm("pack", "--invite", *words, "-w", organiser)
    assert (done.code, "an invitation is for one party" in done.err) == (2, True)


# --- what may come in its place

Members = dict[str, bytes]


def bent(invite: Path, change: Callable[[Members], Members], federation: str = "tiny") -> Path:
    """An invitation that is a sound bundle, of other files."""
    invite.write_bytes(bundle_bytes(federation, change(dict(read_bundle(invite).members))))
    return invite


def saying(**claims: object) -> Callable[[Members], Members]:
    return lambda found: found | {"invite.json": json_bytes(json.loads(found["invite.json"]) | claims)}


def agreeing(old: str, new: str) -> Callable[[Members], Members]:
    """Another agreement, which the invitation vouches for."""

    def change(found: Members) -> Members:
        text = found["fedcollm.toml"].replace(old.encode(), new.encode())
        return saying(agreement_sha256=sha256(text))(found | {"fedcollm.toml": text})

    return change


def having(name: str, content: bytes = b"{}") -> Callable[[Members], Members]:
    return lambda found: found | {name: content}


def without(name: str) -> Callable[[Members], Members]:
    return lambda found: {other: content for other, content in found.items() if other != name}


def task(text: str) -> Callable[[Members], Members]:
    return having("task-0001", text.encode())


HOLDS = "holds other task files than it names"
MISTAKE = "holds invite.json with a mistake"
HOSTILE: dict[str, tuple[Callable[[Members], Members], int, str]] = {
    "another version": (saying(format="fedcollm/invite/2"), 5, "of the format fedcollm/invite/2, this program knows"),
    "a version that a terminal obeys": (saying(format="\x1b[2J"), 5, "of the format \\x1b[2J,"),
    "no version": (saying(format=None), 5, "of the format None"),
    "an unknown word": (saying(run="rm -rf"), 4, f"{MISTAKE}: run: Extra inputs"),
    "a program's version that is a command": (saying(made_with="1; rm"), 4, f"{MISTAKE}: made_with"),
    "an extra that is not ours": (saying(extras=["evil"]), 4, f"{MISTAKE}: extras.0"),
    "a client that is not": (saying(client=9), 4, "is for client 9, and its agreement has clients 1 to 3"),
    "client 0": (saying(client=0), 4, f"{MISTAKE}: client"),
    "a huge client": (saying(client=10**30), 4, f"{MISTAKE}: client"),
    "a client that is a word": (saying(client="2"), 4, f"{MISTAKE}: client"),
    "up and out": (saying(tasks=["../../evil.yaml"]), 4, f"{MISTAKE}: tasks.0"),
    "an absolute path": (saying(tasks=["/etc/evil.yaml"]), 4, f"{MISTAKE}: tasks.0"),
    "a hidden file": (saying(tasks=[".evil.yaml"]), 4, f"{MISTAKE}: tasks.0"),
    "a hidden folder": (saying(tasks=[".git/evil.yaml"]), 4, f"{MISTAKE}: tasks.0"),
    "a program": (saying(tasks=["utils.py"]), 4, f"{MISTAKE}: tasks.0"),
    "another system's path": (saying(tasks=["a\\b.yaml"]), 4, f"{MISTAKE}: tasks.0"),
    "a line end in a name": (saying(tasks=["a.yaml\n"]), 4, f"{MISTAKE}: tasks.0"),
    "a deep path": (saying(tasks=["a/" * 9 + "a.yaml"]), 4, f"{MISTAKE}: tasks.0"),
    "a long name": (saying(tasks=["a" * 130 + ".yaml"]), 4, f"{MISTAKE}: tasks.0"),
    "a file that is a folder too": (
        lambda found: saying(tasks=["a.json", "b/a.yaml", "B.yaml", "b.yaml"])(
            found | {f"task-000{k}": b"" for k in (2, 3, 4)}
        ),
        4,
        "names a task file twice",
    ),
    "a task that is not there": (saying(tasks=["colours.yaml", "more.yaml"]), 4, HOLDS),
    "a task that is not named": (having("task-0002"), 4, HOLDS),
    "a file of elsewhere": (having("machine.toml"), 4, "holds machine.toml, which has no place in an invitation"),
    "a round beside": (having("round-0001/client-2/manifest.json"), 4, "which has no place in an invitation"),
    "a huge task": (having("task-0001", b" " * (5 << 20)), 4, "holds task-0001 with 5242880 bytes, at most 4194304"),
    "a huge agreement": (having("fedcollm.toml", b" " * (2 << 20)), 4, "holds fedcollm.toml with 2097152 bytes"),
    "another agreement than it says": (having("fedcollm.toml", b""), 4, "holds another fedcollm.toml than it says"),
    "an agreement that is none": (agreeing("[slm]", "[slim]"), 2, "slim: unknown key"),
    "clients without end": (agreeing("clients = 3", f"clients = {10**12}"), 2, "updates of clients in all rounds"),
    "rounds without end": (agreeing("rounds = 2", f"rounds = {10**18}"), 2, "at most 1000000 can be followed"),
    "an agreement of another name": (agreeing('"tiny"', '"other"'), 4, "is called another federation's: tiny"),
    "no agreement": (without("fedcollm.toml"), 4, "holds no fedcollm.toml"),
    "no invitation": (
        without("invite.json"),
        5,
        "is no invitation: it is what `fedcollm pack` makes",
    ),
    "no JSON": (having("invite.json", b"{'"), 4, "is not strict JSON"),
    "JSON without end": (having("invite.json", b"[" * 100_000), 4, "is not strict JSON"),
    "a key twice": (having("invite.json", b'{"format": 1, "format": 1}'), 4, "appears twice"),
    "an evaluation that is none": (having("evaluation.toml", b"run = 1"), 2, "run: unknown key"),
    "code in a task": (task(TASK + "process_docs: !function os.system\n"), 5, "would run code: !function os.system"),
    "a dataset that is a program": (task("task: colours\ndataset_path: evil.py\n"), 5, "would run code"),
    "an include of elsewhere": (task("include: /etc/evil.yaml\ntask: x\n"), 2, "includes /etc/evil.yaml, which is"),
    "YAML that grows": (
        task("a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
        )),
        2,
        "holds more than 1000000 values",
    ),
    "YAML without end": (task("[" * 100_000), 2, "is not YAML"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_not_an_invitation_as_we_make_it_leaves_no_folder(
    kind: str, invite: Path, refused: Callable[..., str]
) -> None:
    change, code, told = HOSTILE[kind]
    said = refused(code, "--invite", bent(invite, change))
    assert told in said
    assert len(said) < 2000
    assert "\x1b" not in said
    assert "new" not in said.partition("\n  in ")[2].partition("\n")[0]  # it names the invitation, not what is gone


def test_a_task_that_includes_a_file_of_this_machine_is_refused(
    invite: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "mine.yaml").write_text("task: colours\n")
    said = refused(5, "--invite", bent(invite, task(f"include: {tmp_path}/mine.yaml\ntask: colours\n")))
    assert "a task file includes mine.yaml from outside of tasks/" in said


@pytest.mark.parametrize("length", [0, 3, 40, 300, 1000, -1])
def test_an_invitation_that_is_cut_short_is_waited_for(length: int, invite: Path, refused: Callable[..., str]) -> None:
    invite.write_bytes(invite.read_bytes()[:length])
    assert "still arriving, or cut short" in refused(3, "--invite", invite)


def test_every_bit_counts(invite: Path, tmp_path: Path, fedcollm: Fedcollm) -> None:
    whole = invite.read_bytes()
    for place in range(0, len(whole), 97):
        content = bytearray(whole)
        content[place] ^= 1
        invite.write_bytes(content)
        assert fedcollm("init", tmp_path / "new", "--invite", invite).code in (3, 4, 5)
        assert not (tmp_path / "new").exists()


def test_another_fingerprint_party_or_file_is_refused(
    invite: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    shown = fingerprint(invite.read_bytes())
    for typed in ("", shown[:-1], shown[:4], "A" * 40):
        assert f"the invitation's fingerprint is {shown}, another" in refused(
            5, "--invite", invite, "--fingerprint", typed
        )
    assert "invites client 2, not client 1" in refused(5, "--invite", invite, "--client", 1)
    assert "invites client 2, not the server" in refused(5, "--invite", invite, "--server")
    assert "is not there" in refused(3, "--invite", tmp_path / "x")
    (tmp_path / "mail.eml").write_text("Dear all,\r\n")
    assert "is not a bundle" in refused(4, "--invite", tmp_path / "mail.eml")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(LARGEST_INVITE_BYTES + 1)
    assert f"at most {LARGEST_INVITE_BYTES} are expected" in refused(4, "--invite", tmp_path / "huge")


def test_unpack_does_not_take_an_invitation_nor_init_what_unpack_takes(
    invite: Path, answered: Path, tmp_path: Path, fedcollm: Fedcollm, refused: Callable[..., str]
) -> None:
    done = fedcollm("unpack", invite, "-w", answered)
    assert (done.code, "is an invitation, which a folder is made from" in done.err) == (5, True)
    assert "fedcollm init FOLDER --invite invite.fedcollm" in done.err
    bundle = tmp_path / "x.fedcollm"
    assert fedcollm("pack", "--client", 2, "--round", 1, "--output", bundle, "-w", answered).code == 0
    said = refused(5, "--invite", bundle)
    assert "is no invitation" in said
    assert "fedcollm unpack x.fedcollm" in said


# --- the whole way


def test_from_an_invitation_to_the_first_round(
    organiser: Path, tmp_path: Path, base_models: Path, fedcollm: Fedcollm
) -> None:
    """As docs/how-to/join.md tells it: the organiser is the server, and each client begins with an invitation."""
    home = tmp_path / "server"
    give = lambda *words: fedcollm(*words)  # noqa: E731
    assert give("init", home, "--agreement", organiser / "fedcollm.toml", "--server").code == 0
    (home / "models").symlink_to(base_models)
    write_rows(home / "private/server/auxiliary.jsonl", rows(12))
    assert give("broadcast", "--round", 1, "-w", home).code == 0
    broadcast = tmp_path / "broadcast"
    assert give("pack", "--server", "--round", 1, "--output", broadcast, "-w", home).code == 0
    for k in (1, 2, 3):
        invite, sent, folder = (tmp_path / f"{name}-{k}" for name in ("invite", "sent", "client"))
        packed = give("pack", "--invite", "--client", k, "--output", invite, "-w", home)
        shown = packed.out.split()[-1]
        made = give("init", folder, "--invite", invite, "--fingerprint", shown)
        assert made.code == 0, made.err
        (folder / "models").symlink_to(base_models)
        write_rows(folder / f"private/client-{k}/train.jsonl", rows(12, start=12 * k))
        assert give("check-rows", "--client", k, "-w", folder).code == 0
        assert give("next", "--client", k, "-w", folder).code == 3
        assert give("unpack", broadcast, "-w", folder).code == 0
        assert give("next", "--client", k, "-w", folder).code == 0
        assert give("pack", "--client", k, "--round", 1, "--output", sent, "-w", folder).code == 0
        assert give("unpack", sent, "-w", home).code == 0
    for _ in ("aggregate", "co-distill"):
        assert give("next", "--server", "-w", home).code == 0
    assert (home / "private/server/round-0001/slm/manifest.json").exists()
    assert [p.name for p in sorted((home / "exchange/round-0001").iterdir())] == [
        *("broadcast", "client-1", "client-2", "client-3")
    ]
