"""vault: where secrets lie, who may read them, and one-time keys that go in one direction."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from federations import with_keys
from stages.files import reading, writing
from stages.parties import one_time_keys
from stages.parties.names import SERVER
from stages.parties.party import Party
from stages.parties.vault import LARGEST_JUMP, Vault
from stages.runtime.errors import Damaged, NotReady, Refused, StorageProblem
from stages.workspace.paths import Workspace
from storage_faults import without_locks


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    folder = tmp_path / "study"
    folder.mkdir()
    from builders import AGREEMENT

    (folder / "fedcollm.toml").write_text(AGREEMENT)
    return Workspace(with_keys(folder, tmp_path / "keys"))


def test_a_vault_is_for_its_user_alone_and_outside_the_workspace(workspace: Workspace, tmp_path: Path) -> None:
    vault = Vault.make(workspace, "client-2")
    assert vault.root.is_relative_to(tmp_path / "keys")
    assert {path.name for path in vault.root.iterdir()} == {
        ".fedcollm-secrets",
        "lock",
        "identity.pem",
        "box.pem",
        "made.json",
        "ratchet.json",
    }
    for path in (tmp_path / "keys").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_the_workspace_holds_only_the_name_of_the_folder_of_keys(workspace: Workspace) -> None:
    vault = Vault.make(workspace, "client-2")
    [path] = [path for path in (workspace.root / "private").rglob("*") if path.is_file()]
    assert path == workspace.secrets_pointer("client-2")
    assert json.loads(path.read_text()) == {"folder": vault.root.parent.name}
    assert Vault.find(workspace, "client-2") == vault
    assert Vault.find(workspace, SERVER) is None


def test_two_vaults_have_nothing_in_common(workspace: Workspace) -> None:
    one, other = Vault.make(workspace, "client-1"), Vault.make(workspace, "client-2")
    assert one.identity.public_key().public_bytes_raw() != other.identity.public_key().public_bytes_raw()
    assert one.box.public_key().public_bytes_raw() != other.box.public_key().public_bytes_raw()
    assert not set(one.prekeys(3)) & set(other.prekeys(3))


@pytest.mark.parametrize(("party", "maker"), [("client-2", "fedcollm keys --client 2"), (SERVER, "fedcollm enroll")])
def test_a_party_without_keys_is_told_how_to_make_them(party: str, maker: str, workspace: Workspace) -> None:
    with pytest.raises(NotReady, match=f"{party} has no keys on this machine") as caught:
        _ = Party(workspace, party).keys
    assert caught.value.mend == maker
    assert caught.value.where == workspace.secrets_pointer(party)


@pytest.mark.parametrize(
    ("name", "mode", "mend"),
    [("identity.pem", 0o644, "chmod 600"), ("ratchet.json", 0o640, "chmod 600"), ("", 0o755, "chmod 700")],
)
def test_secrets_that_others_can_read_are_refused_with_the_command_that_mends_it(
    name: str, mode: int, mend: str, workspace: Workspace
) -> None:
    path = Vault.make(workspace, "client-2").root / name
    path.chmod(mode)
    with pytest.raises(Refused, match=rf"others can read the secret .*\(mode {mode:04o}\)") as caught:
        Vault.find(workspace, "client-2")
    assert caught.value.mend == f"{mend} {path}"
    path.chmod(0o700 if not name else 0o600)
    assert Vault.find(workspace, "client-2") is not None


def test_secrets_of_another_user_are_refused(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    Vault.make(workspace, "client-2")
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(Refused, match="belongs to another user") as caught:
        Vault.find(workspace, "client-2")
    assert (caught.value.mend or "").startswith(f"chown {own + 1} ")


def test_keys_are_never_made_in_the_workspace(workspace: Workspace) -> None:
    inside = Workspace(with_keys(workspace.root, workspace.root / "private" / "keys"))
    with pytest.raises(Refused, match="secret keys lie in the workspace") as caught:
        Vault.make(inside, "client-2")
    assert "machine.toml" in (caught.value.mend or "")
    assert not (workspace.root / "private").exists()


@pytest.mark.parametrize("secrets", ["exchange/k", "../study/exchange/k", "runs/../exchange/k"])
def test_keys_are_never_made_in_what_travels(secrets: str, workspace: Workspace) -> None:
    """Nor in the workspace that this one was derived from, where relative paths start."""
    derived = workspace.root / "runs/seed-8"
    derived.mkdir(parents=True)
    (derived / "fedcollm.toml").write_bytes((workspace.root / "fedcollm.toml").read_bytes())
    (derived / "machine.toml").write_text(f'secrets = "{secrets}"\nhome = "../.."\n')
    with_keys(workspace.root, Path(secrets))
    for folder in (workspace.root, derived):
        with pytest.raises(Refused, match="secret keys lie in the workspace"):
            Vault.make(Workspace(folder), "client-2")
    assert not (workspace.root / "exchange").exists()


def test_a_relative_data_folder_of_the_user_is_passed_over(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (workspace.root / "machine.toml").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("data", "", "./exchange"):
        monkeypatch.setenv("XDG_DATA_HOME", value)
        vault = Vault.make(Workspace(workspace.root), "client-2")
        assert vault.root.is_relative_to(tmp_path / "home/.local/share/fedcollm")


def test_what_another_process_is_writing_is_no_secret_that_others_can_read(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = Vault.make(workspace, "client-2")
    (vault.root / ".ratchet.json.17.partial").touch(mode=0o644)
    listed = [*vault.root.iterdir(), vault.root / "gone.json"]
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(listed))
    assert Vault.find(workspace, "client-2") == vault


def test_its_lock_is_for_its_user_alone_and_held_by_one(workspace: Workspace) -> None:
    vault = Vault.make(workspace, "client-2")

    def enter() -> None:
        with vault.alone():
            pass

    with ThreadPoolExecutor() as pool, vault.alone():
        entered = pool.submit(enter)
        with pytest.raises(TimeoutError):
            entered.result(timeout=0.5)
    entered.result()
    assert stat.S_IMODE((vault.root / "lock").stat().st_mode) == 0o600
    with Party(workspace, "client-2").keys.alone():
        pass


def test_what_is_done_once_is_not_done_where_there_are_no_locks(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = Vault.make(workspace, "client-2")
    without_locks(monkeypatch)
    with pytest.raises(StorageProblem, match="no locks") as caught, vault.alone():
        pytest.fail("it was done without a lock")
    assert caught.value.exit_code == 8
    assert "secrets in machine.toml" in str(caught.value.mend)


def test_keys_that_were_moved_into_the_workspace_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    Vault.make(workspace, "client-2")
    shutil.move(tmp_path / "keys", workspace.root / "keys")
    inside = Workspace(with_keys(workspace.root, workspace.root / "keys"))
    with pytest.raises(Refused, match="secret keys lie in the workspace"):
        Vault.find(inside, "client-2")
    (tmp_path / "link").symlink_to(workspace.root / "keys")
    linked = Workspace(with_keys(workspace.root, tmp_path / "link"))
    with pytest.raises(Refused, match="secret keys lie in the workspace"):
        Vault.find(linked, "client-2")


def test_keys_that_are_gone_are_told_from_keys_never_made(workspace: Workspace) -> None:
    shutil.rmtree(Vault.make(workspace, "client-2").root)
    with pytest.raises(Refused, match="the keys of client-2 are gone") as caught:
        Vault.find(workspace, "client-2")
    assert caught.value.mend == ("put that folder back; or fedcollm keys --client 2 --renew, for a new federation")


@pytest.mark.parametrize("name", ["../../etc", "tiny", "", "tiny-0123456789abcdef/x", None])
def test_a_pointer_that_leads_elsewhere_is_damaged(name: str | None, workspace: Workspace) -> None:
    Vault.make(workspace, SERVER)
    workspace.secrets_pointer(SERVER).write_text(json.dumps({"folder": name}))
    with pytest.raises(Damaged, match="names no folder of keys") as caught:
        Vault.find(workspace, SERVER)
    assert caught.value.mend == "fedcollm enroll --renew makes new keys, for a new federation"


@pytest.mark.parametrize("name", ["identity.pem", "box.pem", "ratchet.json"])
@pytest.mark.parametrize("harm", ["gone", "empty"])
def test_a_secret_that_is_gone_or_damaged_is_named(name: str, harm: str, workspace: Workspace) -> None:
    vault = Vault.make(workspace, "client-2")
    (vault.root / name).unlink()
    if harm == "empty":
        (vault.root / name).touch(mode=0o600)
    uses = {
        "identity.pem": lambda: vault.identity,
        "box.pem": lambda: vault.box,
        "ratchet.json": lambda: vault.advance(0),
    }
    with pytest.raises(Damaged, match=name) as caught:
        uses[name]()
    assert caught.value.where == vault.root / name
    assert caught.value.mend


# --- one-time keys


def test_the_public_keys_are_those_of_the_secret_ones_slot_after_slot(workspace: Workspace) -> None:
    vault = Vault.make(workspace, "client-2")
    public = vault.prekeys(5)
    assert len(set(public)) == 5
    assert [vault.advance(slot).public_key().public_bytes_raw().hex() for slot in (0, 1, 1, 3, 4)] == [
        public[slot] for slot in (0, 1, 1, 3, 4)
    ]


def test_a_key_that_was_passed_is_gone_for_good(workspace: Workspace) -> None:
    vault = Vault.make(workspace, "client-2")
    first = json.loads((vault.root / "ratchet.json").read_text())["seed"]
    vault.advance(2)
    kept = json.loads((vault.root / "ratchet.json").read_text())
    # Two links further, by the derivation itself.
    assert kept.pop("record_sha256")
    assert kept == {"slot": 2, "seed": one_time_keys.next_seed(one_time_keys.next_seed(bytes.fromhex(first))).hex()}
    assert not any(first.encode() in path.read_bytes() for path in vault.root.iterdir())
    for slot in (0, 1):
        with pytest.raises(Refused, match=f"opened with key {slot}; client-2 is at key 2") as caught:
            vault.advance(slot)
        assert "erased for good" in (caught.value.mend or "")


def test_a_jump_that_would_burn_many_keys_is_refused_and_burns_none(workspace: Workspace) -> None:
    vault = Vault.make(workspace, "client-2")
    with pytest.raises(Refused, match="opened with key 9; client-2 is at key 0"):
        vault.advance(LARGEST_JUMP + 1)
    assert vault.kept("ratchet")["slot"] == 0  # type: ignore[index]
    assert isinstance(vault.advance(LARGEST_JUMP), X25519PrivateKey)


def test_what_is_kept_is_found_again_and_nothing_else_is(workspace: Workspace) -> None:
    vault = Vault.make(workspace, "client-2")
    assert vault.kept("round-0001") is None
    assert vault.pinned is None
    vault.keep("round-0001", {"attempt": 1})
    vault.pin(b"roster\n")
    again = Party(workspace, "client-2").keys
    assert again.kept("round-0001") == {"attempt": 1}
    assert again.pinned == b"roster\n"


def test_a_vault_shows_nothing_secret_of_itself(workspace: Workspace) -> None:
    vault = Vault.make(workspace, "client-2")
    seed = json.loads((vault.root / "ratchet.json").read_text())["seed"]
    assert seed not in repr(vault)
    assert vault.identity.private_bytes_raw().hex() not in repr((vault, vault.identity, vault.box))


def test_what_a_killed_process_left_of_seeds_and_shares_is_erased_by_the_next(workspace: Workspace) -> None:
    vault = Vault.make(workspace, "client-2")
    names = ("ratchet.json", "round-0001.json", "identity.pem", "public.json", "federation.json")
    left = [vault.root / f".{name}.12-ab.partial" for name in names]
    for path in left:
        path.write_text('{"slot": 0, "seed": "00"}')
    with vault.alone():
        assert not any(path.exists() for path in left)
    assert (vault.kept("ratchet") or {})["slot"] == 0


def test_a_one_time_key_is_held_against_the_one_that_was_published(workspace: Workspace) -> None:
    vault = Vault.make(workspace, "client-2")
    first, second = vault.prekeys(2)
    vault.check_own(0, first)
    vault.check_own(1, second)
    with pytest.raises(Damaged, match=r"the secret ratchet.json of client-2 is not the one that it enrolled with"):
        vault.check_own(0, second)
    vault.advance(1)
    vault.check_own(0, second)  # gone: nothing to hold it against


class KilledError(BaseException):
    """The process ends here; not an Exception: no code of ours may catch it and go on."""


@pytest.mark.parametrize("at", ["identity.pem", "box.pem", "made.json", "ratchet.json", "keys.json"])
def test_secrets_of_a_making_that_was_killed_are_erased_by_the_next(
    at: str, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = writing.write

    def dying(path: Path, content: bytes, **how: Any) -> None:
        if path.name == at:
            (path.parent / f".{at}.12-ab.partial").write_bytes(content)
            raise KilledError
        write(path, content, **how)

    monkeypatch.setattr(writing, "write", dying)
    with pytest.raises(KilledError):
        Vault.make(workspace, "client-2")
    [left] = (tmp_path / "keys").iterdir()
    monkeypatch.undo()
    vault = Vault.make(workspace, "client-2")
    assert list((tmp_path / "keys").iterdir()) == [vault.root.parent] != [left]
    assert not workspace.secrets_unfinished("client-2").exists()


def test_keys_that_were_made_are_not_erased_where_the_process_was_killed_just_then(workspace: Workspace) -> None:
    vault = Vault.make(workspace, "client-2")
    workspace.secrets_unfinished("client-2").write_bytes(workspace.secrets_pointer("client-2").read_bytes())
    Vault.erase_unfinished(workspace, "client-2")
    assert Party(workspace, "client-2").keys == vault
    assert vault.identity
    assert not workspace.secrets_unfinished("client-2").exists()


def test_one_flipped_bit_anywhere_in_a_secret_is_named_and_the_secret_is_not_used(workspace: Workspace) -> None:
    vault = Vault.make(workspace, "client-2")
    vault.keep("round-0001", {"attempt": 1})
    vault.pin(b"roster\n")
    uses: dict[str, Callable[[], object]] = {
        "identity.pem": lambda: vault.identity,
        "box.pem": lambda: vault.box,
        "made.json": lambda: vault.identity,
        "ratchet.json": lambda: vault.advance(0),
        "round-0001.json": lambda: vault.kept("round-0001"),
        "joined.json": lambda: vault.pinned,
        "federation.json": lambda: vault.pinned,
    }
    assert {path.name for path in vault.root.iterdir()} - {".fedcollm-secrets", "lock"} == set(uses)
    assert list(vault.faults()) == []
    for name, use in uses.items():
        content = (vault.root / name).read_bytes()
        for at in range(len(content)):
            (vault.root / name).write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
            with pytest.raises(Damaged, match=name) as caught:
                use()
            assert "put it back from a copy" in (caught.value.mend or "")
            if at % 50 == 0:
                assert name in [problem.where.name for problem in vault.faults() if problem.where]
        (vault.root / name).write_bytes(content)
    assert list(vault.faults()) == []


def test_secrets_of_an_earlier_version_which_wrote_no_digests_are_taken(workspace: Workspace) -> None:
    vault = Vault.make(workspace, "client-2")
    vault.pin(b"roster\n")
    seed = (vault.kept("ratchet") or {})["seed"]
    for name in ("made.json", "joined.json"):
        (vault.root / name).unlink()
    (vault.root / "ratchet.json").write_bytes(reading.json_bytes({"slot": 0, "seed": seed}))
    assert vault.pinned == b"roster\n"
    assert vault.identity
    assert vault.advance(0)
    assert list(vault.faults()) == []
