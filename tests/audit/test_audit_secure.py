"""audit of what is signed, and of secure aggregation: every promise that the files alone can show."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from builders import ROOT, edit, make_workspace, sign
from damages import (
    CLIENT,
    MANIFEST,
    SERVER,
    Harm,
    at,
    flip,
    problems,
)
from stages.audit.audit import audit
from stages.federation.run import run
from stages.parties.party import Party
from stages.workspace.paths import Workspace


@pytest.fixture(scope="session")
def signed_once(base_models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished workspace in which all parties have enrolled, and the folder of their keys."""
    from stages.parties.enroll import enroll
    from stages.parties.join import join
    from stages.parties.keys import keys

    top = tmp_path_factory.mktemp("signed")
    folder, secrets = make_workspace(top / "study", base_models), top / "secrets"
    (folder / "machine.toml").write_text(f'secrets = "{secrets}"\n')
    for client in (1, 2, 3):
        keys(Workspace(folder), client=client)
    mark = enroll(Workspace(folder)).fingerprint
    for client in (1, 2, 3):
        join(Workspace(folder), client=client, fingerprint=mark)
    run(Workspace(folder), scores=False)
    return folder, secrets


@pytest.fixture
def signed(signed_once: tuple[Path, Path], tmp_path: Path) -> Path:
    """Such a workspace of one's own, with a copy of the keys."""
    folder = shutil.copytree(signed_once[0], tmp_path / "signed", symlinks=True)
    shutil.copytree(signed_once[1], tmp_path / "keys")
    (folder / "machine.toml").write_text(f'secrets = "{tmp_path / "keys"}"\n')
    return folder


def test_a_signed_workspace_is_clean_and_nothing_is_skipped(signed: Path) -> None:
    found = audit([signed])
    assert problems(found) == []
    assert [one.id for one in found if one.level == "SKIP"] == ["A9", "A10"]
    assert any("14 manifests signed by 4 keys" in one.found for one in found)


def swap_signatures(folder: Path) -> None:
    shutil.copy(folder / "exchange/round-0001/client-1/manifest.json.sig", folder / CLIENT / "manifest.json.sig")


def another_roster(folder: Path) -> None:
    """The server shows its machine one roster, and client 2 has pinned another."""
    vault = Party(Workspace(folder), "client-2").keys
    vault.pin((vault.pinned or b"").replace(b'"federation": "tiny"', b'"federation": "wide"'))


FORGED: dict[str, tuple[Harm, str]] = {
    "unsigned": (
        lambda f: (f / CLIENT / "manifest.json.sig").unlink(),
        f"A1 FAIL {CLIENT}/manifest.*not there",
    ),
    "signed by another": (swap_signatures, f"A1 FAIL {CLIENT}/manifest.json.sig: .* signed with key_id"),
    "edited": (at(CLIENT, sign, steps=99), f"A1 FAIL {CLIENT}/manifest.json.sig: .* is not what client-2 signed"),
    "another roster": (at(CLIENT, sign, federation_sha256=None), f"A1 FAIL {CLIENT}: is of another roster: none"),
    "roster edited": (
        lambda f: edit(f / "exchange/federation.json", '"federation": "tiny"', '"federation": "wide"'),
        "A1 FAIL exchange/federation.json: .* is not what the server signed",
    ),
    "another roster pinned": (
        another_roster,
        "A1 FAIL exchange/federation.json: is not the roster that client-2 has pinned",
    ),
    "keys replaced": (
        lambda f: shutil.copy(f / "exchange/keys/client-1.json", f / "exchange/keys/client-2.json"),
        "A1 FAIL exchange/keys/client-2.json: .* holds the keys of client 1",
    ),
    "open to others": (
        lambda f: next((f.parent / "keys").rglob("identity.pem")).chmod(0o644),
        r"A8 FAIL .*identity.pem: others can read the secret identity.pem \(mode 0644\); expected 0700",
    ),
}


@pytest.mark.parametrize("kind", FORGED)
def test_what_is_signed_cannot_be_changed_unseen(kind: str, signed: Path) -> None:
    harm, expected = FORGED[kind]
    harm(signed)
    said = problems(audit([signed]))
    assert any(re.match(expected, line) for line in said), said


def test_without_keys_here_the_roster_is_nobodys_word_and_its_fingerprint_is_told(signed: Path) -> None:
    shutil.rmtree(signed / "private")
    [skip] = [one for one in audit([signed]) if (one.id, one.level) == ("A1", "SKIP")]
    assert re.search(
        "nobody here has pinned it; its fingerprint, to compare with a client's: ([A-Z2-7]{4}-?){10}$", skip.found
    )


@pytest.fixture(scope="session")
def secure_once(base_models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished workspace in secure mode, and the folder of its keys."""
    top = tmp_path_factory.mktemp("secure")
    folder, secrets = make_workspace(top / "study", base_models), top / "secrets"
    (folder / "machine.toml").write_text(f'secrets = "{secrets}"\n')
    edit(folder / "fedcollm.toml", "[distillation]", '[aggregation]\nmode = "secure"\n[distillation]')
    run(Workspace(folder), scores=False)
    return folder, secrets


@pytest.fixture
def secure(secure_once: tuple[Path, Path], tmp_path: Path) -> Path:
    """Such a workspace of one's own."""
    folder = shutil.copytree(secure_once[0], tmp_path / "secure", symlinks=True)
    shutil.copytree(secure_once[1], tmp_path / "keys")
    (folder / "machine.toml").write_text(f'secrets = "{tmp_path / "keys"}"\n')
    return folder


def test_a_round_of_secure_aggregation_is_clean_and_no_client_is_compared(secure: Path) -> None:
    found = audit([secure])
    assert problems(found) == []
    skipped = {one.id: one.found for one in found if one.level == "SKIP"}
    assert skipped.keys() == {"A6", "A10"}
    assert skipped["A6"] == "secure mode: nobody sees a single client's update"
    told = [one.text for one in found if one.id == "A9" and one.where]
    assert [re.sub("T [0-9a-f]{8}", "T", text) for text in told] == [
        f"round 000{number}: T.., t=3, 3 of 3 masked updates, 3 survivors, 3 reveals" for number in (1, 2)
    ]


def said(folder: Path, *keys: str, to: object) -> None:
    """Change what a manifest says, deep in it, and make it agree with its files."""
    manifest = json.loads((folder / MANIFEST).read_text())
    inner = manifest
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    sign(folder, **manifest)


def other_vector(folder: Path) -> None:
    values = safetensors.numpy.load_file(folder / "masked.safetensors")["y"]
    safetensors.numpy.save_file({"y": values + np.uint32(1)}, folder / "masked.safetensors")
    sign(folder)


def readable(folder: Path) -> None:
    """A client whose software sends its update unmasked, as 32-bit numbers of another kind."""
    values = safetensors.numpy.load_file(folder / "masked.safetensors")["y"]
    safetensors.numpy.save_file({"y": values.astype("f4")}, folder / "masked.safetensors")
    sign(folder)


CLOSE, REVEAL, BEGIN = "exchange/round-0001/close", "exchange/round-0001/reveal-2", "exchange/round-0001/broadcast"
SECURE: dict[str, tuple[Harm, str]] = {
    "another transcript": (at(CLIENT, said, "transcript", to="0" * 64), f"A9 FAIL {CLIENT}: was made for another open"),
    "another vector": (at(CLIENT, other_vector), f"A9 FAIL {CLIENT}/masked.safetensors: is not the vector that its"),
    "unmasked": (at(CLIENT, readable), f"A9 FAIL {CLIENT}/masked.safetensors: .* holds y F32 .* expected y U32"),
    "another pair key": (
        at(CLIENT, said, "masking", "commit_pairs", "client-1", to="0" * 64),
        f"A9 FAIL {BEGIN}: clients 1 and 2 derived different pair keys",
    ),
    "no pair key": (at(CLIENT, said, "masking", "commit_pairs", to={}), f"A9 FAIL {CLIENT}: commits to keys with"),
    "threshold": (at(BEGIN, said, "opening", "threshold", to=4), f"A9 FAIL {BEGIN}: t=4; expected t=3"),
    "strangers": (at(BEGIN, said, "opening", "clients", to=[1, 2, 9]), f"A9 FAIL {BEGIN}: is opened for clients"),
    "another prekey": (
        at(BEGIN, said, "opening", "prekeys", to=["0" * 64] * 3),
        f"A9 FAIL {BEGIN}: names another key of client-1; expected its own of slot 0",
    ),
    "keys used twice": (
        at("exchange/round-0002/broadcast", said, "opening", "slot", to=0),
        "A9 FAIL exchange/round-0002/broadcast: is opened with keys 0, after keys 0 were used",
    ),
    "another past": (
        at("exchange/round-0002/broadcast", said, "opening", "previous_sha256", to="0" * 64),
        f"A9 FAIL exchange/round-0002/broadcast: follows another broadcast than {BEGIN}",
    ),
    "another roster": (
        at(BEGIN, said, "opening", "previous_sha256", to="0" * 64),
        f"A9 FAIL {BEGIN}: follows another roster: 0000",
    ),
    "close over another vector": (
        at(CLOSE, said, "closing", "client-2", to="0" * 64),
        f"A9 FAIL {CLOSE}: closes over another vector of client-2: 0000",
    ),
    "close over too few": (
        at(CLOSE, said, "closing", to={"client-1": "0" * 64}),
        f"A9 FAIL {CLOSE}: closes over 1 client; expected 3 or more",
    ),
    "late": (at(CLOSE, said, "closing", to={"client-1": "0" * 64}), f"A9 WARN {CLIENT}: came after the close"),
    "a stranger's close": (
        at(CLOSE, said, "closing", "client-9", to="0" * 64),
        f"A9 FAIL {CLOSE}: closes over client-9; expected clients of",
    ),
    "reveal for another close": (
        at(REVEAL, said, "parents", "close", to="0" * 64),
        f"A9 FAIL {REVEAL}: is for another close of this round",
    ),
    "two closes": (
        lambda f: (shutil.copytree(f / CLOSE, f / "again/round-0001/close"), flip_text(f / "again/round-0001/close")),
        "A1 FAIL again/round-0001/close: contradicts exchange/round-0001/close",
    ),
    "opened by too few": (
        at(SERVER, said, "unmasking", "revealed", to=[1, 2]),
        f"A9 FAIL {SERVER}: was opened by 2 reveals, of .1, 2.; expected 3 or more",
    ),
    "another sum": (at(SERVER, said, "unmasking", "count", to=2), f"A9 FAIL {SERVER}: is a sum over .*, count 2"),
    "not unmasked": (at(SERVER, said, "unmasking", to=None), f"A9 FAIL {SERVER}: does not say how it was unmasked"),
    "counts told": (at(CLIENT, said, "examples", to=24), f"A7 FAIL {CLIENT}/{MANIFEST}: tells examples; expected noth"),
    "reveal changed": (lambda f: flip(f / REVEAL / "reveal.bin"), f"A2 FAIL {REVEAL}/reveal.bin: sha256"),
}


def flip_text(folder: Path) -> None:
    said(folder, "attempt", to=1)


@pytest.mark.parametrize("kind", SECURE)
def test_what_secure_aggregation_promises_is_checked_from_the_files(kind: str, secure: Path) -> None:
    harm, expected = SECURE[kind]
    harm(secure)
    paths = [secure, secure / "again"] if (secure / "again").exists() else [secure]
    found = problems(audit(paths))
    assert any(re.match(expected, line) for line in found), found


def test_what_an_earlier_attempt_left_is_told_and_no_warning(secure: Path) -> None:
    at(BEGIN, said, "attempt", to=1)(secure)
    told = [one for one in audit([secure]) if one.where == CLIENT and one.id == "A1" and one.level != "FAIL"]
    assert [(one.level, one.found) for one in told] == [
        ("SKIP", "is of an earlier attempt at its round, which counts no more")
    ]


def test_secure_mode_without_its_roster_is_a_failure(secure: Path) -> None:
    for path in secure.glob("exchange/federation.json*"):
        path.unlink()
    assert any(line.startswith("A1 FAIL exchange/federation.json: is missing") for line in problems(audit([secure])))


def test_a_client_that_vanished_before_the_close_costs_nothing_but_is_told(secure: Path) -> None:
    """What is left when client 2's upload never came: its adapter stays in its private folder, and is no update."""
    shutil.rmtree(secure / CLIENT)
    found = [line for line in problems(audit([secure])) if "private/client-2" in line]
    assert found == []


# --- by hand


def test_a_signature_and_the_fingerprint_are_checked_by_hand_as_the_docs_say(secure: Path) -> None:
    from stages.parties.roster import fingerprint

    page = (ROOT / "docs/how-to/keys.md").read_text()
    [command] = [text for text in re.findall(r"```sh\n(.*?)```", page, re.S) if text.startswith("python -c")]
    done = subprocess.run(["bash", "-e", "-c", command], cwd=secure, capture_output=True, text=True)
    mark = fingerprint((secure / "exchange/federation.json").read_bytes()).replace("-", "")
    assert done.stdout.splitlines() == ["signed by the server as fedcollm/broadcast", mark], done.stderr
    flip(secure / "exchange/round-0001/broadcast" / MANIFEST)
    assert subprocess.run(["bash", "-e", "-c", command], cwd=secure, capture_output=True).returncode != 0
