"""Secure rounds on four machines that share what is copied between them, driven by `next` alone, as cron would."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from _pytest.capture import FDCapture
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from builders import Outcome, rows, write_rows
from command_line import give
from federations import CLIENTS, Machines, agreement, vault_of
from stages.artefacts.arrays import read_array
from stages.artefacts.reading import read_artefact
from stages.exchange.transfers import transfers
from stages.parties import one_time_keys
from stages.parties.party import Party
from stages.progress.status import status
from stages.secagg import masking, shamir
from stages.secagg.one_round import round_of
from stages.workspace.paths import Workspace

IN_DATA, IN_PATH, USER = "Xylophone-4711", "Quetzalcoatl-0815", "Rumpelstiltskin-42"
PARTIES = ("server", *(f"client-{k}" for k in CLIENTS))


def call(*words: object) -> Outcome:
    """The command line in this process, outside any one test."""
    capture = FDCapture(1), FDCapture(2)
    for one in capture:
        one.start()
    try:
        code = give(*words)
    finally:
        sys.stdout.flush()
        out, err = (one.snap() for one in capture)
        for one in capture:
            one.done()
    return Outcome(code, out, err)


@dataclass
class Federation:
    """Machines, and all that they did and said until nothing was left to do."""

    machines: Machines
    given: dict[str, list[str]] = field(default_factory=lambda: {party: [] for party in PARTIES})
    codes: set[int] = field(default_factory=set)
    said: list[str] = field(default_factory=list)
    seeds: dict[str, str] = field(default_factory=dict)

    def note(self, party: str, text: str) -> None:
        """What a party did or waits for, each time that changes."""
        if self.given[party][-1:] != [text]:
            self.given[party].append(text)

    def tick(self, party: str) -> bool:
        """What cron does on a machine: status, and next. Whether something was done."""
        machines = self.machines
        told = status(Workspace(machines.folders[party]))
        self.note(party, str(told.next_command or f"waits for {told.waiting_for}"))
        for words in (("status",), ("status", "--json")):
            self.said.append("".join(machines.give(party, *words).__dict__[key] for key in ("out", "err")))
        outcome = call("next", "-w", machines.folders[party])
        self.codes.add(outcome.code)
        self.said.append(outcome.out + outcome.err)
        if not told.next_command:
            expected = (3, "waiting for") if told.waiting_for else (9, "nothing is left to do")
            assert outcome.code == expected[0], outcome.err
            assert expected[1] in outcome.out + outcome.err
            return False
        assert outcome.out.strip() == str(told.next_command), outcome.err
        return True


@pytest.fixture(scope="module")
def federation(base_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Two rounds, done by cron and by copies, with one person at each client who joins the roster."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("USER", "LOGNAME", "USERNAME"):
            patch.setenv(name, USER)
        top = tmp_path_factory.mktemp("federation") / IN_PATH
        top.mkdir()
        found = Federation(Machines.set_up(top, base_models, call, agreement(), CLIENTS))
        machines = found.machines
        for k in CLIENTS:
            own = machines.folders[f"client-{k}"] / f"private/client-{k}/train.jsonl"
            write_rows(own, [row | {"prompt": f"{IN_DATA} {row['prompt']}"} for row in rows(12, start=12 * k)])
        for _ in range(40):
            done = [found.tick(party) for party in PARTIES]
            for party in PARTIES:
                ratchet = found.machines.folders[party] / "private" / party / "keys.json"
                if party not in found.seeds and ratchet.exists():
                    kept = json.loads((vault_of(machines.folders[party], party) / "ratchet.json").read_text())
                    assert kept["slot"] == 0
                    found.seeds[party] = kept["seed"]
            machines.up(*CLIENTS)
            machines.down(*CLIENTS)
            for k in CLIENTS:
                if found.given[f"client-{k}"][-1].startswith("waits for a person"):
                    fingerprint = machines.give("server", "enroll").out.strip()
                    outcome = machines.client(k, "join", "--fingerprint", fingerprint)
                    found.said.append(outcome.out + outcome.err)
                    done.append(True)
            if not any(done) and all(found.given[party][-1] == "waits for " for party in PARTIES):
                break
        yield found


def test_each_party_is_told_its_next_step_from_an_empty_workspace_to_the_end(federation: Federation) -> None:
    def a_round(k: int, number: int) -> list[str]:
        return [
            f"fedcollm client-train --client {k} --round {number}",
            f"waits for the close of round {number}, in exchange/",
            f"fedcollm reveal --client {k} --round {number}",
        ]

    for k in CLIENTS:
        # What it waits for while copies are on their way depends on when cron looks; what it does, does not.
        assert [step for step in federation.given[f"client-{k}"] if step.startswith("fedcollm")] == [
            f"fedcollm keys --client {k}",
            *(step for number in (1, 2) for step in a_round(k, number) if step.startswith("fedcollm")),
        ]
        waits = [step for step in federation.given[f"client-{k}"] if step.startswith("waits")]
        assert waits[-1] == "waits for "
        assert set(waits) <= {
            "waits for the roster, exchange/federation.json, from the server's `fedcollm enroll`",
            f"waits for a person to compare the roster's fingerprint: fedcollm join --client {k}",
            "waits for the broadcast of round 1, in exchange/",
            "waits for the close of round 1, in exchange/",
            "waits for the broadcast of round 2, in exchange/",
            "waits for the close of round 2, in exchange/",
            "waits for ",
        }
        assert f"waits for a person to compare the roster's fingerprint: fedcollm join --client {k}" in waits
        assert "waits for the close of round 2, in exchange/" in waits
    server = [
        step
        for number in (1, 2)
        for step in (
            f"fedcollm broadcast --round {number}",
            f"waits for the updates of clients 1 to 3, round {number} (exchange/round-000{number}/client-1, ...)",
            f"fedcollm aggregate --round {number}",
            f"waits for the reveals of clients 1 to 3, round {number} (exchange/round-000{number}/reveal-1, ...)",
            f"fedcollm aggregate --round {number}",
            f"fedcollm co-distill --round {number}",
        )
    ]
    assert federation.given["server"] == [
        "waits for exchange/keys of client-1, client-2, client-3",
        "fedcollm enroll",
        *server,
        "fedcollm evaluate --round 2 --model slm",
        "waits for ",
    ]


def test_cron_sees_three_exit_codes_and_nothing_is_ever_replaced(federation: Federation) -> None:
    assert federation.codes == {0, 3, 9}  # done, wait, nothing left to do
    assert not any("--overwrite" in text for given in federation.given.values() for text in given)


def test_the_machines_end_with_the_mean_of_what_clients_keep(federation: Federation) -> None:
    folders = federation.machines.folders
    for number in (1, 2):
        name = f"round-000{number}"

        def flat(folder: Path) -> np.ndarray:
            found = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
            return np.concatenate([value.ravel().astype(np.float64) for _, value in sorted(found.items())])

        before = flat(folders["server"] / "exchange" / name / "broadcast")
        own = [flat(folders[f"client-{k}"] / f"private/client-{k}/{name}/slm") - before for k in CLIENTS]
        found = flat(folders["server"] / f"private/server/{name}/aggregate") - before
        expected = np.mean(own, axis=0)
        assert np.sqrt(np.mean((found - expected) ** 2)) < 5e-6 * np.sqrt(np.mean(expected**2))


# --- what must be nowhere


def everything(folders: Sequence[Path]) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def written(secret: bytes) -> list[bytes]:
    """How a secret could stand in a file: raw, hexadecimal, base64."""
    return [secret, secret.hex().encode(), secret.hex().upper().encode(), base64.b64encode(secret).rstrip(b"=")[:-1]]


def own_masks(federation: Federation, number: int) -> dict[int, bytes]:
    """b_u of each client in a round, put together with every client's one-time keys as nobody else can."""
    folder = federation.machines.folders["server"]
    theta = read_artefact(folder / f"exchange/round-000{number}/broadcast")
    round, found = round_of(theta), {}
    assert theta.manifest.opening is not None
    secrets = {k: chain(federation.seeds[f"client-{k}"], 3)[theta.manifest.opening.slot] for k in CLIENTS}
    for dealer in CLIENTS:
        update = read_artefact(folder / f"exchange/round-000{number}/client-{dealer}")
        path, width = update.path / "shares.safetensors", masking.sealed_row_bytes(3)
        sealed = read_array(update.contents[path.name], path, name="s", kind="U8", shape=(3, width))
        kept = json.loads(
            (vault_of(federation.machines.folders[f"client-{dealer}"], f"client-{dealer}") / f"round-000{number}.json")
            .read_text()
        )  # fmt: skip
        shares = {dealer: bytes.fromhex(kept["own_shares"])[: shamir.SHARE_BYTES]}
        for holder in CLIENTS:
            if holder != dealer:
                assert update.manifest.masking is not None
                opened = masking.open_row(
                    sealed[holder - 1],
                    round,
                    dealer=dealer,
                    holder=holder,
                    secret=secrets[holder],
                    y_sha256=update.manifest.masking.y_sha256,
                )
                shares[holder] = opened[0].tobytes()
        found[dealer] = recovered(shares)
        assert masking.commit_self(round, dealer, found[dealer]) == update.manifest.masking.commit_self  # type: ignore[union-attr]
    return found


def recovered(shares: dict[int, bytes]) -> bytes:
    secret = shamir.join(shares)
    assert secret is not None
    return secret


def chain(seed: str, length: int) -> list[X25519PrivateKey]:
    """The first one-time keys of a seed."""
    found, link = [], bytes.fromhex(seed)
    for _ in range(length):
        found.append(one_time_keys.prekey(link))
        link = one_time_keys.next_seed(link)
    return found


def test_no_secret_is_in_any_workspace_nor_in_what_any_command_said(federation: Federation) -> None:
    machines = federation.machines
    secrets: dict[str, bytes] = {}
    for party, folder in machines.folders.items():
        vault = Party(Workspace(folder), party).keys
        secrets[f"{party}'s identity"] = vault.identity.private_bytes_raw()
        secrets[f"{party}'s box"] = vault.box.private_bytes_raw()
        link = bytes.fromhex(federation.seeds[party])
        for slot in range(4):
            secrets[f"{party}'s seed {slot}"] = link
            secrets[f"{party}'s one-time key {slot}"] = one_time_keys.prekey(link).private_bytes_raw()
            link = one_time_keys.next_seed(link)
    for number in (1, 2):
        secrets |= {f"b of {k} in {number}": mask for k, mask in own_masks(federation, number).items()}
        for k in CLIENTS:
            vault_folder = vault_of(machines.folders[f"client-{k}"], f"client-{k}")
            shares = bytes.fromhex(json.loads((vault_folder / f"round-000{number}.json").read_text())["own_shares"])
            size = shamir.SHARE_BYTES
            secrets |= {f"own share {i} of {k} in {number}": shares[i * size : (i + 1) * size] for i in range(3)}
    assert len(secrets) == 4 * (2 + 8) + 2 * (3 + 9)
    haystack = everything(list(machines.folders.values())) | {Path("said"): "\n".join(federation.said).encode()}
    for name, secret in secrets.items():
        assert len(set(secret)) > 8, name
        for form in written(secret):
            assert [path for path, content in haystack.items() if form in content] == [], name
    # The search finds what is there: the public halves are in the exchange.
    public = Party(Workspace(machines.folders["client-2"]), "client-2").keys.identity.public_key().public_bytes_raw()
    assert any(public.hex().encode() in content for content in haystack.values())


def test_no_data_no_path_and_no_name_is_in_any_exchanged_byte(federation: Federation) -> None:
    folders = federation.machines.folders
    exchanged = everything([folder / "exchange" for folder in folders.values()])
    assert len(exchanged) > 100
    for canary in (IN_DATA, IN_PATH, USER):
        for form in (canary, canary.lower(), canary.split("-")[0], base64.b64encode(canary.encode())[:12].decode()):
            assert [path for path, content in exchanged.items() if form.encode() in content] == [], canary
    # The search finds them where they are.
    assert any(IN_DATA.encode() in content for content in everything(list(folders.values())).values())


def test_a_clients_readable_adapter_is_on_no_other_machine(federation: Federation) -> None:
    folders = federation.machines.folders
    for k in CLIENTS:
        own = (folders[f"client-{k}"] / f"private/client-{k}/round-0001/slm/adapter_model.safetensors").read_bytes()
        for party in PARTIES:
            if party != f"client-{k}":
                assert own not in everything([folders[party]]).values()


# --- what it costs


def test_comm_cost_counts_to_the_byte_what_was_copied(federation: Federation) -> None:
    """Against the sizes of the files on the machines themselves."""
    folders = federation.machines.folders
    found = transfers(Workspace(folders["server"]))

    def size(folder: Path, *names: str) -> int:
        return sum(
            path.stat().st_size for path in folder.rglob("*") if path.is_file() and (not names or path.name in names)
        )

    def moved(number: int, sender: str, receiver: str) -> int:
        return sum(t.size_bytes for t in found if (t.round, t.sender, t.receiver) == (number, sender, receiver))

    for k in CLIENTS:
        exchange, party = folders[f"client-{k}"] / "exchange", f"client-{k}"
        for number in (1, 2):
            folder = exchange / f"round-000{number}"
            assert moved(number, party, "server") == size(folder / party) + size(folder / f"reveal-{k}")
            manifest = ("manifest.json", "manifest.json.sig", f"client-{k}.safetensors")
            assert moved(number, "server", party) == size(folder / "broadcast") + size(folder / "close", *manifest)
        assert moved(0, party, "server") == size(exchange / "keys", f"client-{k}.json", f"client-{k}.json.sig")
        roster = ("federation.json", "federation.json.sig")
        assert moved(0, "server", party) == size(exchange / "keys") + size(exchange, *roster)
    told = call("comm-cost", "-w", folders["server"])
    assert told.code == 0
    assert "keys" in told.out
