"""No order of commands, and no server, opens one client's update: a state machine over the real commands and files.

The clients are honest: they run client-train and reveal, crash and run them again. The server is not: it opens rounds
as often as it likes, with any clients and keys, shows different clients different broadcasts and closes, closes with
any survivors, twice, and replays whatever it once signed. Training alone is replaced, by an update that is always the
same for a client and a round: the worst case, in which a second upload hides nothing new.

FEDCOLLM_PROTOCOL_EXAMPLES=2000 plays so many new games; in CI they are few and the same in every run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from builders import AGREEMENT, random_adapter, rows, write_rows
from stages.artefacts import adapter_files
from stages.artefacts.adapter_files import flat
from stages.artefacts.arrays import array_bytes, read_array
from stages.artefacts.draft import Draft
from stages.artefacts.manifest import BaseIdentity, Manifest, Opening
from stages.artefacts.publishing import publish
from stages.artefacts.reading import Artefact, inbox, read_artefact
from stages.artefacts.steps import Over
from stages.client_train import ClientTrain, Opened, client_train
from stages.files import writing
from stages.parties import memory
from stages.parties.enroll import enroll
from stages.parties.join import join
from stages.parties.keys import keys
from stages.parties.names import SERVER
from stages.parties.party import Party
from stages.reveal import reveal
from stages.runtime.errors import Problem
from stages.secagg import fixed_point, masking, one_round, reveals, unmasking
from stages.secagg.one_round import round_of
from stages.workspace.averaging import threshold
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MASKED_UPDATE, SEALED_REVEAL, SEALED_SHARES
from stages.workspace.paths import Workspace

EXAMPLES = int(os.environ.get("FEDCOLLM_PROTOCOL_EXAMPLES", "0"))
CLIENTS, ROUNDS = range(1, 6), (1, 2)
LAYOUT = {"x.lora_A.weight": (4, 3), "x.lora_B.weight": (5, 4)}
NOBODY = BaseIdentity(architecture="gpt2", weights_sha256="0" * 64, tokenizer_sha256="0" * 64)


class CrashError(BaseException):
    """The client's machine dies; not an Exception: no code of ours may catch it and go on."""


def update_of(round: int, client: int) -> adapter_files.Tensors:
    """What training would give, from an adapter of zeros."""
    return random_adapter(LAYOUT, seed=10 * round + client)


def published(self: ClientTrain, opened: Opened, _: None, over: Over) -> Manifest:
    """In the place of what client-train's training leaves."""
    theta, client = opened.start.theta, self.party.number
    assert client is not None
    writing.write_log(self.log, [{"inputs": {"data": opened.data_sha256}}])
    weights = adapter_files.weights_bytes(update_of(self.round, client))
    [target] = self.publishes
    return publish(
        target,
        {ADAPTER_CONFIG: theta.contents[ADAPTER_CONFIG], ADAPTER_WEIGHTS: weights},
        Draft(
            stage="client-train",
            round=self.round,
            attempt=theta.manifest.attempt,
            parents={"broadcast": theta.sha256},
            base=NOBODY,
            parameters=theta.manifest.parameters,
            examples=1,
        ),
        by=self.party,
        over=over[target],
    )


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each party, and their secrets; all have joined."""
    world = tmp_path_factory.mktemp("enrolled") / "world"
    text = AGREEMENT.replace("clients = 3", f"clients = {len(CLIENTS)}")
    text = text.replace(
        "[evaluation]", '[aggregation]\nmode = "secure"\nmin_clients = 4\nmax_update_value = 1.0\n[evaluation]'
    )
    for party in (SERVER, *(f"client-{k}" for k in CLIENTS)):
        (world / party).mkdir(parents=True)
        (world / party / "fedcollm.toml").write_text(text)
        (world / party / "machine.toml").write_text('secrets = "../secrets"\n')
    server = world / SERVER
    for k in CLIENTS:
        write_rows(world / f"client-{k}" / "private" / f"client-{k}" / "train.jsonl", rows(4))
        keys(Workspace(world / f"client-{k}"), client=k)
        shutil.copytree(world / f"client-{k}" / "exchange", server / "exchange", dirs_exist_ok=True)
    fingerprint = enroll(Workspace(server)).fingerprint
    for k in CLIENTS:
        shutil.copytree(server / "exchange", world / f"client-{k}" / "exchange", dirs_exist_ok=True)
        join(Workspace(world / f"client-{k}"), client=k, fingerprint=fingerprint)
    return world


@dataclass(frozen=True)
class Upload:
    """A masked update that a client has published, whatever became of it."""

    client: int
    round: int
    transcript: str
    update: Artefact
    y: np.ndarray
    rows: np.ndarray

    @property
    def name(self) -> str:
        assert self.update.manifest.masking is not None
        return self.update.manifest.masking.y_sha256


@dataclass(frozen=True)
class Close:
    """A close that the server has signed, of an opening, over some uploads."""

    theta: Artefact
    closed: Artefact
    survivors: dict[int, Upload]

    @property
    def missing(self) -> list[int]:
        assert self.theta.manifest.opening is not None
        return [k for k in self.theta.manifest.opening.clients if k not in self.survivors]


FEW = st.sampled_from([set(), {5}, {2}, {1, 3}]) | st.sets(st.sampled_from(CLIENTS), max_size=2)
SOME = st.just(frozenset[int]()) | st.just(frozenset[int]()) | st.sets(st.sampled_from(CLIENTS))
MOST = st.just(set(CLIENTS)) | st.sets(st.sampled_from(CLIENTS), min_size=3)


class Protocol(RuleBasedStateMachine):
    """template: the enrolled world that every game begins with."""

    template: Path
    reached: ClassVar[set[str]] = set()

    def __init__(self) -> None:
        super().__init__()
        self.world = Path(tempfile.mkdtemp(prefix="fedcollm-protocol-")) / "world"
        shutil.copytree(self.template, self.world)
        self.server = Workspace(self.world / SERVER)
        self.thetas: list[Artefact] = []
        self.uploads: dict[str, Upload] = {}
        self.closes: list[Close] = []
        self.revealed: dict[str, dict[int, np.ndarray]] = defaultdict(dict)  # by close, by client
        self.count = 0
        self.sent: set[tuple[int, int]] = set()  # client, round
        self.told: set[tuple[int, int]] = set()
        self.restored: set[int] = set()
        self._patches = contextlib.ExitStack()
        self._patches.enter_context(mock.patch.object(ClientTrain, "compute", return_value=None))
        self._patches.enter_context(mock.patch.object(ClientTrain, "publish", published))
        self._patches.enter_context(mock.patch.object(writing, "_sync"))  # no power fails here

    def teardown(self) -> None:
        self._patches.close()
        shutil.rmtree(self.world.parent)

    def at(self, client: int) -> Workspace:
        return Workspace(self.world / f"client-{client}")

    def _place(self) -> Path:
        self.count += 1
        return self.world / "signed" / str(self.count)

    # --- the server

    @rule(
        round=st.sampled_from(ROUNDS),
        attempt=st.integers(0, 2),
        jump=st.integers(0, 2),
        clients=MOST,
        others=SOME,
        follows=st.booleans(),
    )
    def open(self, round: int, attempt: int, jump: int, clients: set[int], others: set[int], follows: bool) -> None:
        """Open a round, and show it; to some clients, perhaps, another opening of the same attempt."""
        for shown in (set(CLIENTS) - others, others):
            if shown:
                theta = self._opened(round, attempt, jump, sorted(clients), follows)
                self._show(theta.path, shown, "broadcast", round)

    @rule(round=st.sampled_from(ROUNDS), absent=FEW, dropped=FEW, others=FEW | SOME)
    def attempt(self, round: int, absent: set[int], dropped: set[int], others: set[int]) -> None:
        """A whole attempt at a round, without some; to others, another close that drops some more.

        Then the two closes change places, and everybody is asked again.
        """
        attempts = [theta.manifest.attempt for theta in self.thetas if theta.manifest.round == round]
        theta = self._opened(round, max(attempts, default=-1) + 1, 1, list(CLIENTS), True)
        self._show(theta.path, set(CLIENTS), "broadcast", round)
        self._train(round, set(CLIENTS) - absent, set(), 1)
        mine = {upload.client: upload for upload in self._all() if upload.transcript == _transcript(theta)}
        both = []
        for left_out in (set(), dropped):
            if survivors := {k: upload for k, upload in sorted(mine.items()) if k not in left_out}:
                both.append(self._closed(theta, survivors).closed.path)
        for closes in (both, both[::-1]):
            for path, seen in zip(closes, (set(CLIENTS) - others, others), strict=False):
                self._show(path, seen, "close", round)
            self._reveal(round, set(CLIENTS) - absent, set())

    def _opened(self, round: int, attempt: int, jump: int, clients: list[int], follows: bool) -> Artefact:
        members = Party(self.server, SERVER).members
        assert members is not None
        used = [theta.manifest.opening.slot for theta in self.thetas if theta.manifest.opening]
        slot = min(11, max(used, default=-1) + jump)
        before = [theta.sha256 for theta in self.thetas if theta.manifest.round == round - 1]
        previous = before[-1] if before and follows else members.sha256
        zeros = {name: np.zeros(shape, np.float32) for name, shape in LAYOUT.items()}
        lora = self.server.agreement.slm.lora
        config = adapter_files.config_bytes(lora, target_modules=["x"], fan_in_fan_out=False)
        place = self._place()
        publish(
            place,
            {ADAPTER_CONFIG: config, ADAPTER_WEIGHTS: adapter_files.weights_bytes(zeros)},
            Draft(
                stage="broadcast",
                round=round,
                attempt=attempt,
                parents={},
                base=NOBODY,
                parameters=32,
                seed=self.count,
                opening=Opening(
                    slot=max(slot, 0),
                    clients=clients,
                    prekeys=[members.prekeys(self.server, k)[max(slot, 0)] for k in clients],
                    threshold=threshold(len(clients)),
                    previous_sha256=previous,
                ),
            ),
            by=Party.server(self.server),
        )
        self.thetas.append(read_artefact(place))
        return self.thetas[-1]

    @precondition(lambda self: self.uploads)
    @rule(data=st.data(), ways=st.integers(1, 2), shown=SOME)
    def close(self, data: st.DataObject, ways: int, shown: set[int]) -> None:
        """Close an opening over any of its uploads, twice perhaps, and show each close to some."""
        masked = {upload.transcript for upload in self._all()}
        theta = data.draw(st.sampled_from([theta for theta in self.thetas if _transcript(theta) in masked][::-1]))
        for seen in [set(CLIENTS), shown][:ways]:
            survivors = {}
            for k in CLIENTS:
                of_client = [u for u in self._all() if u.client == k and u.transcript == _transcript(theta)]
                if of_client and data.draw(st.integers(0, 5)):
                    survivors[k] = data.draw(st.sampled_from(of_client[::-1]))
            if survivors:
                self._show(self._closed(theta, survivors).closed.path, seen, "close", theta.manifest.round)

    def _closed(self, theta: Artefact, survivors: dict[int, Upload]) -> Close:
        clients = round_of(theta).clients
        inboxes = {
            inbox(k): array_bytes("s", np.stack([u.rows[clients.index(k)] for u in survivors.values()]))
            for k in survivors
        }
        place = self._place()
        publish(
            place,
            inboxes,
            Draft(
                stage="close",
                round=theta.manifest.round,
                attempt=theta.manifest.attempt,
                parents={"broadcast": theta.sha256} | {f"client-{k}": u.update.sha256 for k, u in survivors.items()},
                base=NOBODY,
                parameters=0,
                transcript=_transcript(theta),
                closing={f"client-{k}": u.name for k, u in survivors.items()},
                seed=self.count,
            ),
            by=Party.server(self.server),
        )
        self.closes.append(Close(theta, read_artefact(place), survivors))
        return self.closes[-1]

    @precondition(lambda self: self.thetas)
    @rule(data=st.data(), shown=SOME)
    def replay(self, data: st.DataObject, shown: set[int]) -> None:
        """Show clients what was signed for others, or long ago."""
        signed = [(theta.path, "broadcast", theta.manifest.round) for theta in self.thetas]
        signed += [(close.closed.path, "close", close.theta.manifest.round) for close in self.closes]
        path, name, round = data.draw(st.sampled_from(signed))
        self._show(path, shown, name, round)

    def _show(self, path: Path, clients: set[int], name: str, round: int) -> None:
        for k in clients:
            place = self.at(k).exchange / f"round-{round:04d}" / name
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(path, place)

    # --- the clients

    @rule(round=st.sampled_from(ROUNDS), clients=SOME, what=st.sampled_from(["client-{}", "reveal-{}"]))
    def move(self, round: int, clients: set[int], what: str) -> None:
        """What was sent is moved away, as rsync --remove-source-files does."""
        for k in clients - self.restored:  # a restored client has nothing else to remember by
            shutil.rmtree(self.at(k).exchange / f"round-{round:04d}" / what.format(k), ignore_errors=True)

    @rule(clients=SOME)
    def copy_keys(self, clients: set[int]) -> None:
        """A backup is made of some clients' secrets."""
        for k in clients:
            shutil.rmtree(self.world / f"backup-{k}", ignore_errors=True)
            shutil.copytree(Party(self.at(k), f"client-{k}").keys.root, self.world / f"backup-{k}")

    @rule(clients=SOME)
    def restore(self, clients: set[int]) -> None:
        """It is put back, while all that was sent since lies in exchange/: such a client sends no more."""
        for k in clients:
            backup, root = self.world / f"backup-{k}", Party(self.at(k), f"client-{k}").keys.root
            is_whole = all((self.at(k).client_update(r, k)).exists() for (c, r) in self.sent if c == k)
            is_whole &= all((self.at(k).reveal(r, k)).exists() for (c, r) in self.told if c == k)
            if backup.exists() and is_whole:
                shutil.rmtree(root)
                shutil.copytree(backup, root)
                self.restored.add(k)
                self.reached.add("a restored vault")

    @precondition(lambda self: self.thetas)
    @rule(round=st.sampled_from(ROUNDS), clients=MOST, crashing=SOME, overwrite=st.integers(0, 4))
    def client_train(self, round: int, clients: set[int], crashing: set[int], overwrite: int) -> None:
        """Some clients give the command."""
        self._train(round, clients, crashing, overwrite)

    def _train(self, round: int, clients: set[int], crashing: set[int], overwrite: int) -> None:
        for k in clients:
            with self._perhaps_crashing(k in crashing, MASKED_UPDATE), contextlib.suppress(Problem, CrashError):
                client_train(self.at(k), client=k, round=round, overwrite=overwrite == 0)
            self._watch_upload(k, round)

    @precondition(lambda self: self.closes)
    @rule(round=st.sampled_from(ROUNDS), clients=MOST, crashing=SOME)
    def reveal(self, round: int, clients: set[int], crashing: set[int]) -> None:
        """Some clients give the command."""
        self._reveal(round, clients, crashing)

    def _reveal(self, round: int, clients: set[int], crashing: set[int]) -> None:
        for k in clients:
            with self._perhaps_crashing(k in crashing, SEALED_REVEAL), contextlib.suppress(Problem, CrashError):
                reveal(self.at(k), client=k, round=round)
            self._watch_reveal(k, round)

    @contextlib.contextmanager
    def _perhaps_crashing(self, crashes: bool, name: str) -> Iterator[None]:
        """If so, the machine dies after the vault was written, before what it knows is published."""
        real = writing.publish

        def dying(folder: Path, contents: dict[str, bytes], **how: Any) -> None:
            if name in contents and "exchange" in folder.relative_to(self.world).parts:
                raise CrashError
            real(folder, contents, **how)

        with mock.patch.object(writing, "publish", dying) if crashes else contextlib.nullcontext():
            yield

    def _watch_upload(self, client: int, round: int) -> None:
        """What the server sees: all that was ever published."""
        place = self.at(client).client_update(round, client)
        if place.exists():
            update = read_artefact(place)
            kept = memory.recall(Party(self.at(client), f"client-{client}").keys, round)
            assert update.manifest.transcript is not None
            theta = next(t for t in self.thetas if _transcript(t) == update.manifest.transcript)
            clients = len(round_of(theta).clients)
            shape = (clients, masking.sealed_row_bytes(clients))
            y = read_array(update.contents[MASKED_UPDATE], place / MASKED_UPDATE, name="y", kind="U32", shape=(35,))
            sealed = read_array(update.contents[SEALED_SHARES], place / SEALED_SHARES, name="s", kind="U8", shape=shape)
            upload = Upload(client, round, update.manifest.transcript, update, y, sealed)
            if upload.name not in self.uploads and kept and kept.broadcast_sha256 == theta.sha256:
                assert kept.y_sha256 == upload.name
            if any(u.client == client and u.round == round for u in self._all() if u.name != upload.name):
                self.reached.add("a second upload of a round")
            assert upload.name in self.uploads or not any(
                u.client == client and u.transcript == upload.transcript for u in self._all()
            ), "masked twice for one opening"
            self.uploads[upload.name] = upload
            self.sent.add((client, round))

    def _watch_reveal(self, client: int, round: int) -> None:
        place = self.at(client).reveal(round, client)
        if not place.exists():
            return
        sent = read_artefact(place)
        self.told.add((client, round))
        close = next(c for c in self.closes if c.closed.sha256 == sent.manifest.parents["close"])
        self.revealed[close.closed.sha256][client] = reveals.open_reveal(
            sent.contents[SEALED_REVEAL],
            client=client,
            box=Party(self.server, SERVER).keys.box,
            close_sha256=close.closed.sha256,
            survivors=len(close.survivors),
            missing=len(close.missing),
        )

    def _all(self) -> list[Upload]:
        return list(self.uploads.values())

    # --- what must hold

    @invariant()
    def a_client_reveals_for_one_close_of_a_round(self) -> None:
        if len([shares for shares in self.revealed.values() if shares]) > 1:
            self.reached.add("reveals for two closes")
        closes = {close.closed.sha256: close.theta.manifest.round for close in self.closes}
        seen = [(k, closes[name]) for name, shares in self.revealed.items() for k in shares]
        assert len(seen) == len(set(seen))

    @invariant()
    def never_both_secrets_of_one_client(self) -> None:
        """b_v of an upload and k_uv that was opened since v was missing: there are not enough shares of both."""
        opened = self._opened_secrets()
        for name, v in {(name, upload.client) for name, upload in self.uploads.items()}:
            transcript = self.uploads[name].transcript
            as_missing = [pair for pair in opened if pair[1] == v and pair[2] == transcript]
            assert not ((name, 0, transcript) in opened and as_missing)

    def _opened_secrets(self) -> set[tuple[str, int, str]]:
        """What enough shares were revealed of: (an upload, 0) its b_u, (an upload of u, v) k_uv; and the transcript."""
        holders: dict[tuple[str, int, str], set[int]] = defaultdict(set)
        needed = {}
        for close in self.closes:
            transcript = _transcript(close.theta)
            needed[transcript] = round_of(close.theta).threshold
            for upload in close.survivors.values():
                for secret in (0, *close.missing):
                    holders[upload.name, secret, transcript] |= self.revealed[close.closed.sha256].keys()
        return {secret for secret, who in holders.items() if len(who) >= needed[secret[2]]}

    @invariant()
    def nothing_tells_one_clients_update(self) -> None:
        """Linear algebra over all uploads: no combination free of unknown masks leaves one client's update alone.

        A client's update is taken to be the same in every attempt at a round; a reused one hides nothing new.
        """
        opened = self._opened_secrets()
        if not opened:
            return
        masks: dict[object, int] = {}
        updates: dict[object, int] = {}
        rows_of: list[tuple[int, dict[int, int]]] = []
        for upload in self.uploads.values():
            row: dict[int, int] = {}
            if (upload.name, 0, upload.transcript) not in opened:
                row[masks.setdefault(upload.name, len(masks))] = 1
            theta = next(t for t in self.thetas if _transcript(t) == upload.transcript)
            for v in round_of(theta).clients:
                pair = (*sorted((upload.client, v)), upload.transcript)
                if v != upload.client and not self._is_open(opened, *pair):
                    row[masks.setdefault(pair, len(masks))] = 1 if v > upload.client else -1
            rows_of.append((updates.setdefault((upload.round, upload.client), len(updates)), row))
        hidden, shown = np.zeros((len(rows_of), len(masks))), np.zeros((len(rows_of), len(updates)))
        for i, (column, row) in enumerate(rows_of):
            shown[i, column] = 1
            for j, sign in row.items():
                hidden[i, j] = sign
        _, singular, right = np.linalg.svd(hidden.T)
        free = right[np.sum(singular > 1e-9) :] @ shown  # combinations in which every unknown mask cancels
        rank = np.linalg.matrix_rank(free) if len(free) else 0
        for column in range(len(updates)):
            alone = np.eye(len(updates))[column : column + 1]
            assert np.linalg.matrix_rank(np.vstack([free, alone])) == rank + 1, (column, updates)

    def _is_open(self, opened: set[tuple[str, int, str]], u: int, v: int, transcript: str) -> bool:
        return any(
            (name, other, transcript) in opened
            for name, upload in self.uploads.items()
            for mine, other in ((u, v), (v, u))
            if upload.client == mine
        )

    @invariant()
    def a_sum_that_opens_is_the_sum_of_the_survivors_numbers(self) -> None:
        for close in self.closes:
            shares, keyed = self.revealed[close.closed.sha256], round_of(close.theta)
            if len(shares) < keyed.threshold:
                continue
            said = {k: upload.update.manifest.masking for k, upload in close.survivors.items()}
            opened = unmasking.open_secrets(
                shares,
                keyed,
                survivors=list(close.survivors),
                commit_selves={k: masking.commit_self for k, masking in said.items() if masking},
                commit_pairs={
                    k: {int(party.partition("-")[2]): digest for party, digest in masking.commit_pairs.items()}
                    for k, masking in said.items()
                    if masking
                },
            )
            total = unmasking.unmask((u.y for u in close.survivors.values()), opened, keyed, threads=1)
            encoded = [
                fixed_point.encode(flat(update_of(u.round, k)), bound=1.0, clients=len(keyed.clients))
                for k, u in close.survivors.items()
            ]
            np.testing.assert_array_equal(total, np.sum(encoded, axis=0, dtype=np.uint32))
            self.reached.add(f"a sum with {len(close.missing)} missing")


def _transcript(theta: Artefact) -> str:
    return one_round.transcript_of(theta)


@pytest.mark.slow
def test_no_order_of_commands_and_no_server_opens_one_clients_update(enrolled: Path) -> None:
    class Game(Protocol):
        template = enrolled

    run_state_machine_as_test(
        Game,
        settings=settings(
            max_examples=EXAMPLES or 50,
            stateful_step_count=20,
            derandomize=not EXAMPLES,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    # What a game that proves nothing would not reach.
    assert Game.reached >= {
        *("a sum with 0 missing", "a sum with 1 missing", "reveals for two closes", "a second upload of a round"),
    }, Game.reached
