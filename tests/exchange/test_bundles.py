"""bundles: a ZIP that other tools read and that we take only if every byte is the one we would have written."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.exchange.bundles import bundle_bytes, read_bundle
from stages.runtime.errors import Damaged, NotReady, Problem, UsageProblem

MEMBERS = {"round-0001/client-2/manifest.json": b'{\n "a": 1\n}\n', "round-0001/client-2/b.bin": bytes(range(256)) * 9}
BUNDLE = bundle_bytes("tiny", MEMBERS)
LAST = "round-0001/client-2/manifest.json"


def read(tmp_path: Path, content: bytes) -> dict[str, bytes]:
    path = tmp_path / "x.fedcollm"
    path.write_bytes(content)
    return read_bundle(path).members


def zipped(
    change: Callable[[zipfile.ZipInfo], None] = lambda info: None, *, more: dict[str, bytes] | None = None
) -> bytes:
    """The bundle as Python's own zipfile writes it, told to; with the last member changed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(BUNDLE)) as source, zipfile.ZipFile(file, "w") as target:
        for one in [*source.infolist(), *(more or {})]:
            name = one if isinstance(one, str) else one.filename
            info = zipfile.ZipInfo(name)
            info.create_version, info.extract_version, info.create_system = 10, 10, 3
            info.external_attr = 0o100644 << 16
            if name == LAST:
                change(info)
            target.writestr(info, (more or {})[name] if isinstance(one, str) else source.read(name))
    return file.getvalue()


def test_other_tools_read_it() -> None:
    with zipfile.ZipFile(io.BytesIO(BUNDLE)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["bundle.json", *sorted(MEMBERS)]
        assert {name: archive.read(name) for name in MEMBERS} == MEMBERS
        listing = json.loads(archive.read("bundle.json"))
    assert listing["format"] == "fedcollm/bundle/1"
    assert [member["size_bytes"] for member in listing["members"]] == [256 * 9, 12]


def test_it_is_what_pythons_zipfile_writes_byte_for_byte() -> None:
    assert zipped() == BUNDLE


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, BUNDLE) == MEMBERS


def test_the_order_in_which_files_are_given_does_not_show() -> None:
    assert bundle_bytes("tiny", dict(reversed(MEMBERS.items()))) == BUNDLE


def relist(old: str, new: str) -> bytes:
    """Another list over the same members, in a ZIP that is sound by itself."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(BUNDLE)) as source, zipfile.ZipFile(file, "w") as target:
        for name in source.namelist():
            text = source.read(name)
            target.writestr(name, text.replace(old.encode(), new.encode()) if name == "bundle.json" else text)
    return file.getvalue()


def bomb(info: zipfile.ZipInfo) -> None:
    info.compress_type = zipfile.ZIP_DEFLATED


def link(info: zipfile.ZipInfo) -> None:
    info.external_attr = 0o120777 << 16


def setuid(info: zipfile.ZipInfo) -> None:
    info.external_attr = 0o104755 << 16


def renamed(info: zipfile.ZipInfo) -> None:
    info.filename = LAST.replace("client-2", "client-3")


def later(info: zipfile.ZipInfo) -> None:
    info.date_time = (2026, 1, 1, 0, 0, 0)


def encrypted() -> bytes:
    """With the flag for encryption in the last member's header."""
    start = BUNDLE.index(b"PK\x03\x04", BUNDLE.index(LAST.encode(), 1000) - 40)
    return BUNDLE[: start + 6] + b"\x01" + BUNDLE[start + 7 :]


NOT_PLAIN = f"has {LAST} as no plain stored file: a link, a folder, compressed, encrypted or renamed"
DAMAGED: dict[str, tuple[bytes, str]] = {
    "a symlink": (zipped(link), NOT_PLAIN),
    "special modes": (zipped(setuid), NOT_PLAIN),
    "another time": (zipped(later), NOT_PLAIN),
    "renamed": (zipped(renamed), NOT_PLAIN),
    "encrypted": (encrypted(), NOT_PLAIN),
    "compressed": (zipped(bomb), "bytes, its own list makes"),
    "a member too many": (zipped(more={"round-0001/client-2/more": b"x"}), "bytes, its own list makes"),
    "bytes before": (b"x" + BUNDLE, "is not a bundle"),
    "bytes after": (BUNDLE + b"x", f"has {len(BUNDLE) + 1} bytes, its own list makes {len(BUNDLE)}"),
    "a comment": (BUNDLE[:-2] + b"\x04\x00note", f"has {len(BUNDLE) + 4} bytes, its own list makes {len(BUNDLE)}"),
    "bytes in the midst": (BUNDLE.replace(b"\xff\x00", b"\xff!\x00", 1), "bytes, its own list makes"),
    "a bit flipped in a file": (BUNDLE.replace(b"\xfe\xff", b"\xfe\xfe", 1), "with another sha256 than it lists"),
    "text-mode transfer": (BUNDLE.replace(b"\n", b"\r\n"), "its line ends were changed on the way"),
    "a pickle": (b"\x80\x04\x95" + bytes(100), "is not a bundle"),
    "a ZIP of something else": (zipped()[:30] + b"other--.txt" + BUNDLE[41:], "it does not begin with bundle.json"),
    "another format": (relist("bundle/1", "bundle/2"), "has a list that is none: format"),
    "an unknown key": (relist('"format"', '"more": 1,"format"'), "has a list that is none: more"),
    "a key twice": (
        relist('"format"', '"federation": "x","format"'),
        "not strict JSON: the key 'federation' appears twice",
    ),
    "a file listed twice": (relist("b.bin", "manifest.json"), "lists a file twice, or out of order"),
    "an absolute path": (
        relist("round-0001/client-2/b", "/etc/round-0001/client-2/b"),
        "a list that is none: members.0.name",
    ),
    "a backslash": (relist("client-2/b", "client-2\\\\b"), "has a list that is none: members.0.name"),
    "a negative size": (relist("2304", "-1"), "has a list that is none: members.0.size_bytes"),
    "a petabyte claimed": (relist("2304", "2304000000000000"), "bytes, its own list makes 230400000000"),
    "more than a petabyte": (relist("2304", "23040000000000000000"), "a list that is none: members.0.size_bytes"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_not_byte_for_byte_a_bundle_is_refused(kind: str, tmp_path: Path) -> None:
    content, expected = DAMAGED[kind]
    assert content != BUNDLE
    with pytest.raises(Damaged) as caught:
        read(tmp_path, content)
    assert expected in caught.value.message
    assert caught.value.where == tmp_path / "x.fedcollm"
    assert caught.value.mend == "have its sender `fedcollm pack` it again, and carry it as a binary file"


@pytest.mark.parametrize("length", [0, 1, 3, 20, 40, 41, 300, len(BUNDLE) - 23, len(BUNDLE) - 1])
def test_one_that_is_cut_short_is_waited_for(length: int, tmp_path: Path) -> None:
    with pytest.raises(NotReady) as caught:
        read(tmp_path, BUNDLE[:length])
    assert "still arriving, or cut short" in caught.value.message
    assert caught.value.mend == "wait until all of it is here, or carry it again"


def test_more_than_a_zip_can_say_is_refused_before_it_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.exchange.bundles.LARGEST_BUNDLE_BYTES", 5 << 20)
    bundle_bytes("tiny", {"a": bytes(1 << 19)})
    with pytest.raises(UsageProblem, match="holds less than 4 GiB") as caught:
        bundle_bytes("tiny", {"a": bytes(1 << 20)})
    assert caught.value.mend == "carry the folders of exchange/ themselves"


def test_every_single_byte_counts(tmp_path: Path) -> None:
    small = bundle_bytes("tiny", {"a": b"12345"})
    assert read(tmp_path, small) == {"a": b"12345"}
    for place in range(len(small)):
        changed = small[:place] + bytes([small[place] ^ 0x10]) + small[place + 1 :]
        try:
            found = read(tmp_path, changed)
        except Problem:
            continue
        raise AssertionError(f"byte {place} may be {changed[place]:#x}: {found}")


EDITS = st.lists(
    st.tuples(st.integers(0, len(BUNDLE)), st.binary(max_size=6), st.integers(0, 6)), min_size=1, max_size=4
)


@settings(max_examples=300, deadline=None)
@given(EDITS)
def test_whatever_is_done_to_a_bundle_it_is_read_unchanged_or_refused(edits: list[tuple[int, bytes, int]]) -> None:
    content = BUNDLE
    for place, new, gone in edits:
        content = content[:place] + new + content[place + gone :]
    assert_sound(content)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 1 << 32))
def test_whatever_stands_in_the_list_it_is_refused(text: bytes, size: int) -> None:
    header = BUNDLE[:18] + struct.pack("<II", size % (1 << 32), len(text)) + BUNDLE[26:41]
    assert_sound(header + text + BUNDLE[-100:])


def assert_sound(content: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.fedcollm"
        path.write_bytes(content)
        try:
            found = read_bundle(path).members
        except Problem as problem:
            assert problem.mend  # noqa: PT017
        else:
            assert (content, found) == (BUNDLE, MEMBERS)
