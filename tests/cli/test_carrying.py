"""fedcollm pack and unpack: one file between two machines, and what is never packed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.numpy

from builders import Outcome, bundled, contents, edit, make_workspace, sign

ROUND = "exchange/round-0001"
WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"


def test_what_is_packed_on_one_machine_is_unpacked_on_another(
    server: Path, answered: Path, pack: Callable[..., Path], fedcollm: Callable[..., Outcome]
) -> None:
    bundle = pack("--client", 2, "--round", 1)
    outcome = fedcollm("unpack", bundle, "-w", server)
    assert outcome.code == 0
    assert outcome.out == f"{ROUND}/client-2\n"
    assert contents(server / ROUND / "client-2") == contents(answered / ROUND / "client-2")
    assert fedcollm("aggregate", "--round", 1, "-w", server).code == 0
    again = fedcollm("unpack", bundle, "-w", server)
    assert again.code == 0
    assert "already done" in again.err


def test_what_the_server_sends_is_the_broadcast(
    answered: Path, pack: Callable[..., Path], fedcollm: Callable[..., Outcome]
) -> None:
    bundle = pack("--server", "--round", 1)
    sent = contents(answered / ROUND / "broadcast")
    assert bundled(bundle) == {f"round-0001/broadcast/{name}": content for name, content in sent.items()}
    shutil.rmtree(answered / "exchange")
    outcome = fedcollm("unpack", bundle, "--json", "-w", answered)
    assert json.loads(outcome.out) == {"unpacked": [f"{ROUND}/broadcast"], "already": []}
    assert contents(answered / ROUND / "broadcast") == sent


def test_the_same_files_give_the_same_bytes_and_a_name_that_says_what_it_is(
    answered: Path, tmp_path: Path, fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = fedcollm("pack", "--client", 2, "--round", 1, "--json", "-w", answered)
    bundle = tmp_path / "tiny-round-0001-client-2.fedcollm"
    found = json.loads(first.out)
    assert found["path"] == str(bundle)
    assert found["sha256"] == hashlib.sha256(bundle.read_bytes()).hexdigest()
    assert [member["name"] for member in found["members"]] == sorted(bundled(bundle))
    os.utime(answered / ROUND / "client-2" / WEIGHTS, (1, 1))
    assert "already done" in fedcollm("pack", "--client", 2, "--round", 1, "-w", answered).err
    bundle.write_bytes(b"mine")
    refused = fedcollm("pack", "--client", 2, "--round", 1, "-w", answered)
    assert refused.code == 5
    assert "is there already, with other bytes" in refused.err
    assert "mend  name another place with --output, or give the command again with --overwrite" in refused.err
    assert bundle.read_bytes() == b"mine"


def other_adapter(folder: Path) -> None:
    tensors = safetensors.numpy.load((folder / WEIGHTS).read_bytes())
    doubled = {name: 2 * tensor for name, tensor in tensors.items()}
    safetensors.numpy.save_file(doubled, folder / WEIGHTS, metadata={"format": "pt"})
    sign(folder)


def test_other_bytes_that_are_there_are_refused_until_overwrite(
    server: Path,
    answered: Path,
    pack: Callable[..., Path],
    fedcollm: Callable[..., Outcome],
    refused: Callable[..., str],
) -> None:
    bundle = pack("--client", 2, "--round", 1)
    shutil.copytree(answered / ROUND / "client-2", server / ROUND / "client-2")
    other_adapter(server / ROUND / "client-2")
    said = refused(server, 5, "unpack", bundle)
    assert f"{ROUND}/client-2 is there already, and is not what x.fedcollm holds" in said
    assert fedcollm("unpack", bundle, "--overwrite", "-w", server).code == 0
    assert contents(server / ROUND / "client-2") == contents(answered / ROUND / "client-2")


# --- secure mode's folders, and keys


def test_a_clients_reveal_goes_with_its_update(
    server: Path, revealed: Path, pack: Callable[..., Path], fedcollm: Callable[..., Outcome]
) -> None:
    bundle = pack("--client", 2, "--round", 1)
    assert fedcollm("unpack", bundle, "-w", server).out.split() == [f"{ROUND}/client-2", f"{ROUND}/reveal-2"]
    for name in ("client-2", "reveal-2"):
        assert contents(server / ROUND / name) == contents(revealed / ROUND / name)


def test_a_close_for_one_client_leaves_out_what_is_for_the_others(
    server: Path, revealed: Path, pack: Callable[..., Path], fedcollm: Callable[..., Outcome]
) -> None:
    inboxes = [name for name in bundled(pack("--server", "--round", 1)) if "close/client" in name]
    assert len(inboxes) == 3
    bundle = pack("--server", "--round", 1, "--to", 2)
    assert [name for name in bundled(bundle) if "close/client" in name] == ["round-0001/close/client-2.safetensors"]
    assert fedcollm("unpack", bundle, "-w", server).code == 0
    assert set(contents(server / ROUND / "close")) == {"client-2.safetensors", MANIFEST, f"{MANIFEST}.sig"}
    assert "already done" in fedcollm("unpack", bundle, "-w", revealed).err  # where the whole close is


def test_a_client_that_a_close_leaves_out_is_sent_the_broadcast_alone(
    server: Path, revealed: Path, tmp_path: Path, fedcollm: Callable[..., Outcome]
) -> None:
    (revealed / ROUND / "close/client-3.safetensors").unlink()
    words = ("pack", "--server", "--round", 1, "--to", 3, "--output", tmp_path / "x.fedcollm", "-w", revealed)
    lost = fedcollm(*words)
    assert lost.code == 4, "the manifest names it"
    manifest = revealed / ROUND / "close" / MANIFEST
    said = json.loads(manifest.read_text())
    del said["files"]["client-3.safetensors"]
    manifest.write_text(json.dumps(said))
    sent = fedcollm(*words)
    assert sent.code == 0, sent.err
    assert "the close of round 1 is not for client 3" in sent.err
    assert {name.split("/")[1] for name in bundled(tmp_path / "x.fedcollm")} == {"broadcast"}


@pytest.fixture
def enrolled(answered: Path) -> Path:
    (answered / "exchange/keys").mkdir()
    for name in ("keys/client-1", "keys/client-2", "federation"):
        (answered / f"exchange/{name}.json").write_text(f'{{"is": "{name}"}}')
        (answered / f"exchange/{name}.json.sig").write_text('{"v": 1}\n')
    return answered


def test_keys_go_to_the_server_and_the_roster_with_all_keys_to_the_clients(
    server: Path, enrolled: Path, pack: Callable[..., Path], fedcollm: Callable[..., Outcome]
) -> None:
    bundle = pack("--keys", "--client", 2)
    keys = ["exchange/keys/client-2.json.sig", "exchange/keys/client-2.json"]
    assert fedcollm("unpack", bundle, "-w", server).out.split() == keys
    bundle = pack("--roster")
    found = json.loads(fedcollm("unpack", bundle, "--json", "-w", server).out)
    others = ["exchange/keys/client-1.json.sig", "exchange/keys/client-1.json"]
    assert found["unpacked"] == ["exchange/federation.json.sig", "exchange/federation.json", *others]
    assert found["already"] == keys
    for name in ("keys/client-1.json", "keys/client-2.json.sig", "federation.json"):
        assert (server / "exchange" / name).read_bytes() == (enrolled / "exchange" / name).read_bytes()


def test_a_secure_round_goes_by_mail(tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome]) -> None:
    whole = make_workspace(tmp_path / "whole", base_models)
    edit(whole / "fedcollm.toml", "[distillation]", '[aggregation]\nmode = "secure"\n\n[distillation]')
    machines = {0: tmp_path / "server", **{k: tmp_path / f"machine-{k}" for k in (1, 2, 3)}}
    for k, folder in machines.items():
        own = f"client-{k}" if k else "server"
        shutil.copytree(whole / "private" / own, folder / "private" / own)
        (folder / "models").symlink_to(base_models)
        shutil.copy(whole / "fedcollm.toml", folder)

    told_to_send = []

    def give(k: int, *words: object, code: int = 0) -> str:
        outcome = fedcollm(*words, "-w", machines[k])
        assert outcome.code == code, outcome.err
        told_to_send.extend(
            re.findall(r"goes to the \w+: carry exchange/ there, or `(.*?)`", " ".join(outcome.err.split()))
        )
        return outcome.out.strip()

    def mail(sender: int, receiver: int, *words: object, overwrite: bool = False) -> None:
        bundle = tmp_path / f"{sender}-{receiver}.fedcollm"
        give(sender, "pack", *words, "--output", bundle, "--overwrite")
        give(receiver, "unpack", bundle, *(["--overwrite"] if overwrite else []))

    for k in (1, 2, 3):
        give(k, "keys", "--client", k)
        mail(k, 0, "--keys", "--client", k)
    fingerprint = give(0, "enroll")
    give(0, "broadcast", "--round", 1)
    for k in (1, 2, 3):
        mail(0, k, "--roster")
        give(k, "join", "--client", k, "--fingerprint", fingerprint)
        mail(0, k, "--server", "--round", 1)
        give(k, "client-train", "--client", k, "--round", 1)
        mail(k, 0, "--client", k, "--round", 1)
    give(0, "aggregate", "--round", 1, code=3)
    mail(0, 3, "--server", "--round", 1, "--to", 1)
    wrong = fedcollm("reveal", "--client", 3, "--round", 1, "-w", machines[3])
    assert wrong.code == 3
    packed = "or it was packed for another client: on the server: fedcollm pack --server --round 1 --to 3"
    assert packed in " ".join(wrong.err.split())
    for k in (1, 2, 3):
        mail(0, k, "--server", "--round", 1, "--to", k, overwrite=k == 3)
        assert [path.name for path in (machines[k] / ROUND / "close").glob("client-*")] == [f"client-{k}.safetensors"]
        give(k, "reveal", "--client", k, "--round", 1)
        mail(k, 0, "--client", k, "--round", 1)
    give(0, "aggregate", "--round", 1)
    assert sorted(told_to_send) == sorted(
        [
            *(f"fedcollm pack --keys --client {k}" for k in (1, 2, 3)),
            *("fedcollm pack --roster", "fedcollm pack --server --round 1"),
            *(2 * [f"fedcollm pack --client {k} --round 1" for k in (1, 2, 3)]),  # the masked update, the reveal
        ]
    )

    for k in machines:
        give(k, "audit")
    told = give(2, "audit", "--json")
    assert "2 files sealed to other clients: not here" in told
    (machines[2] / ROUND / "close/client-2.safetensors").unlink()
    assert "close/client-2.safetensors" in give(2, "audit", code=4)
    (machines[0] / ROUND / "close/client-2.safetensors").unlink()
    assert "close/client-2.safetensors" in give(0, "audit", code=4)

    masked = fedcollm("diff", machines[0] / ROUND / "client-1", machines[0] / ROUND / "client-2")
    assert masked.code == 2
    assert "is masked, in secure mode: nobody can read it, only the sum of all can be seen" in masked.err
    assert "arrive" not in masked.err


def test_the_second_leg_of_a_secure_round_has_a_name_of_its_own(
    revealed: Path, tmp_path: Path, fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    aside = {name: revealed / ROUND / name for name in ("close", "reveal-2")}
    packs = [("pack", "--server", "--round", 1, "--to", 2), ("pack", "--client", 2, "--round", 1)]
    for name, path in aside.items():
        path.rename(tmp_path / name)
    for words in packs:
        assert fedcollm(*words, "-w", revealed).code == 0
    for name, path in aside.items():
        (tmp_path / name).rename(path)
    for words in packs:
        assert fedcollm(*words, "-w", revealed).code == 0
    assert {path.name for path in tmp_path.glob("*.fedcollm")} == {
        "tiny-round-0001-server-to-2.fedcollm",
        "tiny-round-0001-server-close-to-2.fedcollm",
        "tiny-round-0001-client-2.fedcollm",
        "tiny-round-0001-client-2-reveal.fedcollm",
    }


# --- what is not packed


@pytest.mark.parametrize(
    ("words", "code", "told", "mend"),
    [
        ("", 2, "pack needs one thing to pack", "fedcollm pack --client 2 --round 5"),
        ("--round 1", 2, "pack needs a sender: either --client or --server", "fedcollm pack --server --round 5"),
        ("--round 1 --server --client 2", 2, "pack needs a sender", "fedcollm pack --client 2 --round 5"),
        ("--round 1 --client 2 --keys", 2, "pack needs one thing", "--keys --client 2"),
        ("--keys", 2, "pack needs one thing", "--keys --client 2"),
        ("--roster --client 2", 2, "pack needs one thing", "--roster"),
        ("--round 1 --client 2 --to 3", 2, "--to is for what the server sends", "--server --round 5 --to 2"),
        ("--round 1 --client 9", 2, "there is no client 9", "federation.clients"),
        ("--round 9 --client 1", 2, "there is no round 9", "federation.rounds"),
        ("--round 2 --client 1", 3, "client 1's update of round 2 is not there", "client-train --client 1 --round 2"),
        ("--round 2 --server", 3, "the broadcast of round 2 is not there", "fedcollm broadcast --round 2"),
        ("--keys --client 2", 3, "client-2.json.sig is not there", "fedcollm keys --client 2"),
        ("--roster", 3, "federation.json.sig is not there", "fedcollm enroll"),
    ],
)
def test_what_cannot_be_packed_is_said(
    words: str, code: int, told: str, mend: str, answered: Path, tmp_path: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm("pack", *words.split(), "--output", tmp_path / "x.fedcollm", "-w", answered)
    assert outcome.code == code
    assert told in outcome.err
    assert mend in outcome.err.partition("mend")[2]
    assert not (tmp_path / "x.fedcollm").exists()


def key_in_a_file(folder: Path) -> None:
    (folder / f"{MANIFEST}.sig").write_text("-----BEGIN PRIVATE KEY-----\nMC4C...\n-----END PRIVATE KEY-----\n")


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / ".fedcollm-secrets").touch(),
        lambda folder: (folder / "identity.pem").touch(),
        key_in_a_file,
    ],
    ids=["marker", "pem", "content"],
)
def test_a_secret_key_is_never_packed(
    harm: Callable[[Path], None], answered: Path, refused: Callable[..., str]
) -> None:
    harm(answered / ROUND / "client-2")
    said = refused(answered, 5, "pack", "--client", 2, "--round", 1, "--output", answered / "x")
    assert "is or holds a secret key, which is never sent" in said
    assert not (answered / "x").exists()


def test_a_damaged_folder_is_not_packed_and_what_rsync_left_stays_behind(
    answered: Path, pack: Callable[..., Path], refused: Callable[..., str]
) -> None:
    folder = answered / ROUND / "client-2"
    (folder / f".{WEIGHTS}.x8sd").write_bytes(b"half")
    assert len(bundled(pack("--client", 2, "--round", 1))) == 3
    (folder / "notes.txt").touch()
    assert "notes.txt does not belong in client-2" in refused(answered, 4, "pack", "--client", 2, "--round", 1)
    (folder / "notes.txt").unlink()
    (folder / CONFIG).write_text("{}")
    assert f"{CONFIG} is not the file its manifest" in refused(answered, 4, "pack", "--client", 2, "--round", 1)
