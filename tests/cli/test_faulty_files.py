"""Secure mode: an exchanged file that is broken, late, or made to harm its reader is refused, and nothing is changed.

The thirty faults that the protocol has an answer to are in tests/cli/test_faulty_*.py, by their numbers: here
3 to 12, 15 and 30.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from builders import Outcome, edit, published
from damages import flip
from faulty_federations import AGGREGATE, ROUND, signed, train

Fedcollm, Refused, Secure = Callable[..., Outcome], Callable[..., str], Callable[[str], Path]
Harm = Callable[[Path], object]

MASKED, SHARES, MANIFEST, SIGNATURE = "masked.safetensors", "shares.safetensors", "manifest.json", "manifest.json.sig"


@pytest.fixture
def answered(secure: Secure) -> Path:
    """Clients 1 to 3 have answered, which is just enough; client 4 has not."""
    folder = secure("answered")
    shutil.rmtree(folder / ROUND / "client-4")
    return folder


def cut(name: str, count: int) -> Harm:
    return lambda folder: os.truncate(folder / name, count)


def remove(name: str) -> Harm:
    return lambda folder: (folder / name).unlink()


def link(name: str) -> Harm:
    def harm(folder: Path) -> None:
        elsewhere = (folder / name).rename(folder.parents[3] / name)
        (folder / name).symlink_to(elsewhere)

    return harm


def pipe(name: str) -> Harm:
    """A FIFO with no writer: whoever opens it for reading in the plain way waits for ever."""

    def harm(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return harm


def text_mode(path: Path) -> None:
    """What a transfer as text does to a file."""
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


# --- 3, 4, 10: as it arrived

STILL_ARRIVING: dict[str, tuple[Harm, str]] = {
    "03 masked.safetensors cut short": (cut(MASKED, 1000), f"{MASKED} has 1000 bytes of "),
    "03 masked.safetensors empty": (cut(MASKED, 0), f"{MASKED} has 0 bytes of "),
    "03 masked.safetensors missing": (remove(MASKED), f"{MASKED} is missing"),
    "03 shares.safetensors cut short": (cut(SHARES, 10), f"{SHARES} has 10 bytes of "),
    "03 shares.safetensors missing": (remove(SHARES), f"{SHARES} is missing"),
    "03 manifest missing": (remove(MANIFEST), "client-2 has no manifest.json yet"),
    "03 signature missing": (remove(SIGNATURE), f"{SIGNATURE} is not there"),
}


@pytest.mark.parametrize("fault", STILL_ARRIVING)
def test_a_part_that_is_still_arriving_is_waited_for_and_then_the_round_goes_on(
    fault: str, answered: Path, tmp_path: Path, fedcollm: Fedcollm, own_secrets: Path
) -> None:
    harm, expected = STILL_ARRIVING[fault]
    update = answered / ROUND / "client-2"
    whole = shutil.copytree(update, tmp_path / "whole")
    harm(update)
    before = published(answered)
    outcome = fedcollm(*AGGREGATE, "-w", answered)
    assert outcome.code == 3
    assert f"warning: client 2's update has not arrived whole: {expected}" in outcome.err
    assert "error: round 1 has 2 of the 3 updates it needs; absent: client 2, 4" in outcome.err
    assert "fedcollm client-train --client 2 --round 1, there; then carry exchange/ here" in outcome.err
    assert published(answered) == before
    shutil.rmtree(update)
    whole.rename(update)
    assert "round 1 is closed over client 1, 2, 3" in fedcollm(*AGGREGATE, "-w", answered).err


AS_IT_ARRIVED: dict[str, tuple[Harm, list[str]]] = {
    "04 bit flipped in the vector": (
        lambda folder: flip(folder / MASKED),
        [f"{MASKED} is not the file its manifest names: sha256 ", ", expected "],
    ),
    "04 bit flipped in the shares": (lambda folder: flip(folder / SHARES), [f"{SHARES} is not the file its manifest"]),
    "04 one byte too many": (
        lambda folder: (folder / MASKED).write_bytes((folder / MASKED).read_bytes() + b"\0"),
        [f"{MASKED} has ", " bytes, its manifest says "],
    ),
    "10 vector symlinked": (link(MASKED), [f"{MASKED} is a symbolic link", "never followed"]),
    "10 manifest symlinked": (link(MANIFEST), [f"{MANIFEST} is a symbolic link"]),
    "10 signature symlinked": (link(SIGNATURE), [f"{SIGNATURE} is a symbolic link"]),
    "10 vector a FIFO": (pipe(MASKED), [f"{MASKED} is not a plain file"]),
    "10 manifest a FIFO": (pipe(MANIFEST), [f"{MANIFEST} is not a plain file"]),
    "10 signature a FIFO": (pipe(SIGNATURE), [f"{SIGNATURE} is not a plain file"]),
    "15 manifest edited": (
        lambda folder: edit(folder / MANIFEST, '"steps": 0', '"steps": 9'),
        [f"{MANIFEST} is not what client-2 signed", "mend  copy both files again"],
    ),
    "30 manifest sent as text": (
        lambda folder: text_mode(folder / MANIFEST),
        [f"{MANIFEST} is not what client-2 signed", "no text-mode transfer"],
    ),
}


@pytest.mark.parametrize("fault", AS_IT_ARRIVED)
def test_a_broken_update_is_refused_at_once_and_stays_where_it_is(fault: str, answered: Path, refused: Refused) -> None:
    harm, expected = AS_IT_ARRIVED[fault]
    harm(answered / ROUND / "client-2")
    said = refused(answered, 4, *AGGREGATE)
    assert f"in    {answered}/{ROUND}/client-2" in said
    assert all(words in said for words in expected), said


# --- 5 to 8: what a client signs that runs other software than ours


def array(name: str, file: str = MASKED, **tensors: np.ndarray) -> Harm:
    """Other tensors in the place of a file's, the one of that name changed by none."""

    def harm(folder: Path) -> None:
        found = safetensors.numpy.load_file(folder / file)
        kept = {name: found[name]} if name else {}
        safetensors.numpy.save_file(kept | tensors, folder / file)

    return harm


def turned(file: str, change: Callable[[np.ndarray], np.ndarray]) -> Harm:
    def harm(folder: Path) -> None:
        [(name, found)] = safetensors.numpy.load_file(folder / file).items()
        safetensors.numpy.save_file({name: np.ascontiguousarray(change(found))}, folder / file)

    return harm


def header(length: int, *, text: bytes = b"") -> Harm:
    """A header that says it is so long; text is what then comes, the tensors by default."""

    def harm(folder: Path) -> None:
        content = text or (folder / MASKED).read_bytes()[8:]
        (folder / MASKED).write_bytes(length.to_bytes(8, "little") + content)

    return harm


def twice(folder: Path) -> None:
    content = (folder / MASKED).read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].rstrip()
    text = text[:-1] + b"," + text[1:]
    (folder / MASKED).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


NOT_OURS = [f"{MASKED} is not a safetensors file, or is cut short"]
FORGED: dict[str, tuple[Harm, list[str]]] = {
    "05 header of 2^64-1 bytes": (header(2**64 - 1), NOT_OURS),
    "05 header longer than the file": (header(10_000), NOT_OURS),
    "05 header said to be of 101 MB": (header(101_000_000), NOT_OURS),
    "05 header of 101 MB": (
        header(101_000_000, text=b"{" + b" " * 101_000_000),
        [f"its manifest says that {MASKED} has 101000009 bytes, here it can have "],
    ),
    "06 a tensor twice": (twice, [f"{MASKED} has a header that is not strict JSON: the key 'y' appears twice"]),
    "06 a tensor too many": (array("y", more=np.zeros(3, "u4")), ["holds more U32 [3], y U32 ", "expected y U32 "]),
    "06 another tensor instead": (array("", z=np.zeros(3, "u4")), ["holds z U32 [3], expected y U32 ["]),
    "06 no tensor": (array(""), [f"{MASKED} holds nothing, expected y U32 "]),
    "07 vector as F16": (turned(MASKED, lambda y: y.astype("f2")), ["holds y F16 [", "expected y U32 ["]),
    "07 vector as a column": (turned(MASKED, lambda y: y[:, None]), [", 1], expected y U32 ["]),
    "07 shares transposed": (turned(SHARES, lambda s: s.T), ["holds s U8 [164, 4], expected s U8 [4, 164]"]),
    "08 vector of another rank": (turned(MASKED, lambda y: np.tile(y, 2)), ["expected y U32 ["]),
}


@pytest.mark.parametrize("fault", FORGED)
def test_a_forged_update_is_refused_in_little_memory_though_its_maker_signs_it(
    fault: str, answered: Path, refused: Refused
) -> None:
    harm, expected = FORGED[fault]
    update = answered / ROUND / "client-2"
    harm(update)
    signed(update, "client-2")
    tracemalloc.start()
    try:
        said = refused(answered, 4, *AGGREGATE)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert f"in    {update}" in said
    assert all(words in said for words in expected), said
    assert peak_bytes < 50e6


# --- 9, 11: names


class Telltale:
    """A pickle that leaves a mark where it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "training_args.pt", "state.pkl"])
def test_09_a_pickle_in_an_update_is_never_opened(
    name: str, answered: Path, tmp_path: Path, refused: Refused, fedcollm: Fedcollm
) -> None:
    (answered / ROUND / "client-2" / name).write_bytes(pickle.dumps(Telltale(tmp_path / "opened")))
    said = refused(answered, 4, *AGGREGATE)
    assert f"{name} does not belong in a masked update" in said
    assert "nothing else is ever opened" in said
    outcome = fedcollm("audit", "-w", answered)
    assert outcome.code == 4
    assert f"A2  FAIL files    {ROUND}/client-2/{name}" in outcome.out
    assert not (tmp_path / "opened").exists()


NOBODY = {
    "a device of Windows": "client-CON",
    "digits that look alike": "client-２",
    "one digit of them": "client-1２",
    "300 digits": "client-" + "1" * 240,
    "bytes that are no text": "client-\udcff",
    "an order to the terminal": "client-\x1b[2J",
    "a zero before": "client-02",
    "a blank behind": "client-2 ",
    "a line's end behind": "client-2\n",
    "a bidirectional mark": "client-\u202e2",
}


@pytest.mark.parametrize("kind", NOBODY)
def test_11_a_folder_of_nobody_is_refused_by_name(kind: str, answered: Path, refused: Refused) -> None:
    (answered / ROUND / "client-2").rename(answered / ROUND / NOBODY[kind])
    said = refused(answered, 5, *AGGREGATE)
    assert "is not a client of this federation, which has clients 1 to 4" in said
    assert "take that folder out of the exchange" in said


@pytest.mark.parametrize("name", ["\udcff", "\x1b[31mred\x1b[2J"])
def test_a_name_that_no_terminal_should_see_is_shown_escaped(name: str, answered: Path, fedcollm: Fedcollm) -> None:
    update = answered / ROUND / "client-2"
    (update / name).write_bytes(b"")
    (answered / ROUND / name).mkdir()
    (answered / ROUND / name / "manifest.json").write_text("{}")
    words = ("verify", AGGREGATE, "pack --client 2 --round 1", "next --server", "report", "audit", "audit --json")
    for command in words:
        given = command.split() if isinstance(command, str) else command
        outcome = fedcollm(*given, "-w", answered)
        assert outcome.code in (0, 3, 4, 5), (command, outcome.err)
        for text in (outcome.out, outcome.err):
            assert "Traceback" not in text
            assert all(c.isprintable() or c == "\n" for c in text), (command, text)
    assert "\\\\x" in outcome.out  # the last one is JSON
    json.loads(outcome.out)


@pytest.mark.parametrize("number", ["../../x", "CON", "two", "0", "-1", "２", "1" * 300, "1" * 5000])
@pytest.mark.parametrize("command", ["client-train --round 1", "reveal --round 1", "keys", "join"])
def test_11_a_client_that_is_no_number_of_the_agreement_is_a_usage_error(
    command: str, number: str, answered: Path, fedcollm: Fedcollm
) -> None:
    before = published(answered)
    outcome = fedcollm(*command.split(), "--client", number, "-w", answered)
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    assert published(answered) == before


CLAIMS: dict[str, tuple[dict[str, object], int, str]] = {
    "another client": ({"client": 3}, 5, "is of another client: 3 (transcript "),
    "a client of 300 digits": ({"client": int("1" * 300)}, 4, "not a fedcollm/1 manifest: client: "),
    "a client that is text": ({"client": "../../etc"}, 4, "not a fedcollm/1 manifest: client: "),
    "a pair with a path": (
        {"masking": {"y_sha256": "0" * 64, "commit_self": "0" * 64, "commit_pairs": {"client-../../x": "0" * 64}}},
        4,
        "client 2 commits to pair keys with other clients than the round's: client-../../x, client-1",
    ),
}


@pytest.mark.parametrize("kind", CLAIMS)
def test_11_what_a_manifest_says_of_clients_is_read_as_strictly(kind: str, answered: Path, refused: Refused) -> None:
    claims, code, expected = CLAIMS[kind]
    signed(answered / ROUND / "client-2", "client-2", **claims)
    said = refused(answered, code, *AGGREGATE)
    assert expected in said
    assert max(map(len, said.splitlines())) < 250


def test_11_a_file_of_a_manifest_with_a_path_for_a_name_is_never_looked_for(answered: Path, refused: Refused) -> None:
    edit(answered / ROUND / "client-2" / MANIFEST, f'"{MASKED}"', '"../../../private/client-1/train.jsonl"')
    said = refused(answered, 4, *AGGREGATE)
    assert "the manifest lists ['../../../private/client-1/train.jsonl', 'shares.safetensors']" in said


# --- 12: while it is being read


@pytest.mark.parametrize(
    ("name", "code", "expected"),
    [(MASKED, 3, f"{MASKED} has 100 bytes of "), (MANIFEST, 4, f"{MANIFEST} is not valid JSON")],
)
def test_12_a_file_cut_short_while_it_is_read_is_no_more_than_a_short_file(
    name: str, code: int, expected: str, answered: Path, fedcollm: Fedcollm, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = answered / ROUND / "client-2" / name
    ask = os.fstat

    def ask_then_cut(descriptor: int) -> os.stat_result:
        status = ask(descriptor)
        if status.st_ino == path.stat().st_ino:
            os.truncate(path, 100)
        return status

    monkeypatch.setattr(os, "fstat", ask_then_cut)
    outcome = fedcollm(*AGGREGATE, "-w", answered)
    assert outcome.code == code
    assert expected in outcome.err


# --- 15, 30: what the server sends, as a client takes it


SENT: dict[str, tuple[Callable[[Path], object], str]] = {
    "15 broadcast edited": (
        lambda folder: edit(folder / ROUND / "broadcast" / MANIFEST, '"round": 1', '"round": 2'),
        f"{MANIFEST} is not what server signed",
    ),
    "15 threshold lowered": (
        lambda folder: edit(folder / ROUND / "broadcast" / MANIFEST, '"threshold": 3', '"threshold": 4'),
        f"{MANIFEST} is not what server signed",
    ),
    "15 another's keys edited": (
        lambda folder: edit(folder / "exchange/keys/client-3.json", '"client": 3', '"client": 4'),
        "client-3.json holds the keys of client 4",
    ),
    "30 broadcast sent as text": (
        lambda folder: text_mode(folder / ROUND / "broadcast" / MANIFEST),
        "no text-mode transfer",
    ),
    "30 keys sent as text": (lambda folder: text_mode(folder / "exchange/keys/client-3.json"), "no text-mode transfer"),
    "30 adapter sent as text": (
        lambda folder: text_mode(folder / ROUND / "broadcast" / "adapter_config.json"),
        "adapter_config.json has ",
    ),
}


@pytest.mark.parametrize("fault", SENT)
def test_what_the_server_sent_and_somebody_changed_is_not_trained_on(
    fault: str, secure: Secure, refused: Refused
) -> None:
    harm, expected = SENT[fault]
    folder = secure("opened")
    harm(folder)
    assert expected in refused(folder, 4, *train(1))


@pytest.mark.parametrize(
    ("what", "code", "expected"),
    [("15 edited", 4, "federation.json is not what the server signed"), ("30 as text", 4, "no text-mode transfer")],
)
def test_a_roster_that_was_changed_is_not_joined(
    what: str, code: int, expected: str, secure: Secure, refused: Refused
) -> None:
    folder = secure("opened")
    path = folder / "exchange/federation.json"
    edit(path, '"federation": "tiny"', '"federation": "tidy"') if what == "15 edited" else text_mode(path)
    assert expected in refused(folder, code, "join", "--client", 1, "--fingerprint", "AAAA")


def test_30_clock_zone_and_language_change_nothing(
    answered: Path, fedcollm: Fedcollm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_secrets: Path
) -> None:
    assert fedcollm(*AGGREGATE, "-w", answered).code == 3
    for client in (1, 2, 3):
        assert fedcollm("reveal", "--client", client, "--round", 1, "-w", answered).code == 0
    other = shutil.copytree(answered, tmp_path / "other", symlinks=True)
    assert fedcollm(*AGGREGATE, "-w", answered).code == 0

    years_s = 3 * 365 * 86400
    for path in (path for path in [*other.rglob("*"), *own_secrets.rglob("*")] if path.is_file()):
        os.utime(path, (time.time() + years_s,) * 2)
    monkeypatch.setattr(time, "time", lambda now=time.time: now() - years_s)
    for name, value in (("TZ", "Pacific/Kiritimati"), ("LC_ALL", "tr_TR.UTF-8"), ("LANG", "tr_TR.UTF-8")):
        monkeypatch.setenv(name, value)
    assert fedcollm(*AGGREGATE, "-w", other).code == 0
    made = "private/server/round-0001/aggregate"
    assert {p.name: p.read_bytes() for p in (other / made).iterdir()} == {
        p.name: p.read_bytes() for p in (answered / made).iterdir()
    }
