"""fedcollm push and pull: two machines and a folder that both reach; a remote that fails, and one that lies."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from builders import Outcome, contents, edit
from stages.workspace.machine import Exchange

ROUND = "exchange/round-0001"
WEIGHTS, MANIFEST = "adapter_model.safetensors", "manifest.json"
Fedcollm = Callable[..., Outcome]


@pytest.fixture
def share(answered: Path, server: Path, tmp_path: Path) -> Path:
    """What both machines reach; `answered` is client 2's."""
    folder = tmp_path / "share"
    for workspace in (answered, server):
        with (workspace / "machine.toml").open("a") as file:
            file.write(f'\n[exchange]\nremote = "file://{folder}"\n')
    return folder


@pytest.fixture
def pushed(share: Path, answered: Path, fedcollm: Fedcollm) -> Path:
    assert fedcollm("push", "--client", 2, "-w", answered).code == 0
    return share / "round-0001" / "client-2"


def test_what_one_party_pushes_another_pulls(share: Path, server: Path, answered: Path, fedcollm: Fedcollm) -> None:
    sent = fedcollm("push", "--client", 2, "--json", "-w", answered)
    assert json.loads(sent.out)["moved"] == ["round-0001/client-2"]
    assert contents(share / "round-0001" / "client-2") == contents(answered / ROUND / "client-2")
    assert json.loads(fedcollm("push", "--client", 2, "--json", "-w", answered).out)["already"] == [
        "round-0001/client-2"
    ]
    got = fedcollm("pull", "--server", "--json", "-w", server)
    assert json.loads(got.out)["moved"] == ["round-0001/client-2"]
    assert contents(server / ROUND / "client-2") == contents(answered / ROUND / "client-2")
    assert fedcollm("aggregate", "--round", 1, "-w", server).code == 0


def test_a_dry_run_tells_what_would_be_moved_and_moves_nothing(
    share: Path, server: Path, answered: Path, fedcollm: Fedcollm
) -> None:
    whole = sum(path.stat().st_size for path in (answered / ROUND / "client-2").iterdir())
    told = json.loads(fedcollm("push", "--client", 2, "--dry-run", "--json", "-w", answered).out)
    assert (told["moved"], told["size_bytes"]) == (["round-0001/client-2"], whole)
    assert not share.exists()
    assert fedcollm("push", "--client", 2, "-w", answered).code == 0
    told = json.loads(fedcollm("pull", "--server", "--dry-run", "--json", "-w", server).out)
    assert (told["moved"], told["size_bytes"]) == (["round-0001/client-2"], whole)
    assert not (server / ROUND / "client-2").exists()
    assert "in 1 would be moved" in fedcollm("pull", "--server", "--dry-run", "-w", server).out


def test_what_a_killed_upload_left_is_written_anew(
    share: Path, answered: Path, fedcollm: Fedcollm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "mv", killed)
        patch.setattr(LocalFileSystem, "rm_file", killed)
        fedcollm("push", "--client", 2, "-w", answered)
    folder = share / "round-0001/client-2"
    [left] = folder.iterdir()
    assert left.name.endswith(".partial")
    assert fedcollm("push", "--client", 2, "-w", answered).code == 0
    assert contents(folder) == contents(answered / ROUND / "client-2")


def test_a_client_pulls_the_broadcast_and_nothing_of_other_clients(
    share: Path, server: Path, answered: Path, fedcollm: Fedcollm
) -> None:
    assert fedcollm("push", "--server", "-w", server).code == 0
    assert fedcollm("push", "--client", 1, "-w", server).code == 0
    shutil.rmtree(answered / "exchange")
    assert fedcollm("pull", "--client", 2, "-w", answered).code == 0
    assert [path.name for path in (answered / ROUND).iterdir()] == ["broadcast"]
    assert contents(answered / ROUND / "broadcast") == contents(server / ROUND / "broadcast")


@pytest.mark.parametrize("lacks", [MANIFEST, WEIGHTS, "a half"])
def test_what_is_not_whole_yet_is_left_for_later(lacks: str, pushed: Path, server: Path, fedcollm: Fedcollm) -> None:
    if lacks == "a half":
        os.truncate(pushed / WEIGHTS, 100)
    else:
        (pushed / lacks).unlink()
    outcome = fedcollm("pull", "--server", "-w", server)
    assert outcome.code == 0
    assert ("is not whole on the remote yet" in outcome.err) == (lacks != MANIFEST)
    assert not (server / ROUND / "client-2").exists()


def flip(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def grow(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 1 << 40)


def grow_manifest(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 1 << 40)


def link(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "elsewhere")
    (folder / WEIGHTS).symlink_to("elsewhere")


@pytest.mark.parametrize("spoil", [flip, grow, grow_manifest, link])
def test_a_remote_that_lies_is_refused_and_nothing_is_written(
    spoil: Callable[[Path], None], pushed: Path, server: Path, refused: Callable[..., str]
) -> None:
    spoil(pushed)
    refused(server, 4, "pull", "--server")
    assert not (server / ROUND / "client-2").exists()


def test_names_of_the_remote_are_never_used(pushed: Path, server: Path, fedcollm: Fedcollm) -> None:
    shutil.copytree(pushed, pushed.with_name("client-9"))
    (pushed / "more.txt").write_text("x")
    assert fedcollm("pull", "--server", "-w", server).code == 0
    assert not (server / ROUND / "client-9").exists()
    assert not (server / ROUND / "client-2" / "more.txt").exists()


def test_other_bytes_on_the_remote_are_replaced_only_with_overwrite(
    pushed: Path, answered: Path, fedcollm: Fedcollm, refused: Callable[..., str]
) -> None:
    mine = contents(pushed)
    edit(pushed / MANIFEST, "tiny", "tony")
    assert "is there already, with other bytes" in refused(answered, 5, "push", "--client", 2)
    assert fedcollm("push", "--client", 2, "--overwrite", "-w", answered).code == 0
    assert contents(pushed) == mine


def test_a_full_remote_is_said_and_the_same_command_goes_on(
    share: Path, answered: Path, fedcollm: Fedcollm, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, source: str, target: str, **options: object) -> None:
        if target.endswith(MANIFEST):
            raise OSError(errno.ENOSPC, "No space left on device")
        Path(source).replace(target)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "mv", fail)
        assert "the remote is full" in refused(answered, 3, "push", "--client", 2)
    folder = share / "round-0001" / "client-2"
    assert WEIGHTS in contents(folder)
    assert MANIFEST not in contents(folder)
    assert not list(folder.glob(".*.partial"))
    assert fedcollm("push", "--client", 2, "-w", answered).code == 0
    assert contents(folder) == contents(answered / ROUND / "client-2")


def test_a_folder_of_the_remote_that_is_a_link_is_not_written_into(
    share: Path, answered: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (share / "round-0001").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (share / "round-0001" / "client-2").symlink_to(tmp_path / "elsewhere")
    assert "is a link" in refused(answered, 5, "push", "--client", 2)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("remote", ["sftp://me:secret@host/x", "simplecache::s3://x", "ftp://host/x", "s3://"])
def test_a_remote_holds_no_password_and_is_one_that_is_known(remote: str) -> None:
    with pytest.raises(ValueError, match="remote"):
        Exchange(remote=remote)


@pytest.mark.parametrize("name", ["secret", "key", "password", "token", "sas_token", "account_key"])
def test_options_hold_no_secret(name: str) -> None:
    with pytest.raises(ValueError, match="looks like a secret"):
        Exchange(remote="s3://bucket/x", options={name: "x"})
    assert Exchange(remote="s3://bucket/x", options={"endpoint_url": "http://x"}).options
