"""A bundle: some of the exchange's files as one file to mail or carry, a ZIP that any tool lists and only we read.

Nothing in it is compressed, and the same files give the same bytes: first bundle.json, which lists the members with
their sizes and digests, then the members, sorted. So a bundle is not parsed but compared: its listing says what every
other byte has to be, and a link, a duplicate, a compressed, encrypted or further member, or a byte between them is a
difference. There is nothing to inflate, and no name is ever a path.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.files import reading
from stages.runtime.errors import Damaged, NotReady, Problem, UsageProblem
from stages.workspace.commands import Command

LISTING = "bundle.json"
LARGEST_BUNDLE_BYTES = (1 << 32) - 1
"""What a ZIP can say without its 64-bit extension."""
LARGEST_NAME = 100
MOST_MEMBERS = 1 << 15

LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
LOCAL_FORM, CENTRAL_FORM, END_FORM = "<4s5H3I2H", "<4s6H3I5H2I", "<4s4H2IH"
END_BYTES = struct.calcsize(CENTRAL_FORM) + len(LISTING) + struct.calcsize(END_FORM)
"""What a bundle has after its members' entries, with the list's own."""
VERSION, UNIX, FIRST_OF_1980, PLAIN_FILE = 10, 3 << 8, 0x21, 0o100644 << 16
PACK_AGAIN = f"have its sender `{Command('pack')}` it again, and carry it as a binary file"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Member(_Part):
    """One file of a bundle."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_./-]*$", max_length=LARGEST_NAME)]
    size_bytes: Annotated[int, Field(ge=0, le=1 << 53)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Listing(_Part):
    """bundle.json."""

    format: Literal["fedcollm/bundle/1"] = "fedcollm/bundle/1"
    federation: Annotated[str, Field(max_length=64)]
    members: Annotated[list[Member], Field(min_length=1, max_length=MOST_MEMBERS)]

    @property
    def size_bytes(self) -> int:
        """How long a bundle with this listing is, without the listing's own member."""
        names = sum(len(member.name) for member in self.members)
        headers = struct.calcsize(LOCAL_FORM) + struct.calcsize(CENTRAL_FORM)
        return sum(member.size_bytes for member in self.members) + headers * len(self.members) + 2 * names


@dataclass(frozen=True)
class Bundle:
    """A bundle as read: whose it is, each file's bytes by its name, which comes from outside, and its own digest."""

    federation: str
    members: dict[str, bytes]
    sha256: str


def bundle_bytes(federation: str, members: Mapping[str, bytes]) -> bytes:
    """The bundle of these files, by names relative to exchange/. Raises UsageProblem if it would be too large."""
    listed = [
        Member(name=name, size_bytes=len(members[name]), sha256=reading.sha256(members[name]))
        for name in sorted(members)
    ]
    listing = Listing(federation=federation, members=listed)
    if listing.size_bytes + reading.LARGEST_JSON_BYTES > LARGEST_BUNDLE_BYTES:
        message = f"a bundle holds less than 4 GiB, this one would have {listing.size_bytes} bytes"
        raise UsageProblem(message, mend="carry the folders of exchange/ themselves")
    return b"".join(_archive({LISTING: reading.json_bytes(listing.model_dump())} | dict(sorted(members.items()))))


def read_bundle(
    path: Path,
    before: Callable[[Listing, Callable[[str], bytes]], None] | None = None,
    *,
    limit_bytes: int = LARGEST_BUNDLE_BYTES,
) -> Bundle:
    """The files of a bundle, each with the digest that it lists. Their names are still to be judged.

    before: raises for a list whose members are not worth reading; it can have small ones read, by their names.
    limit_bytes: a larger file is refused unread.
    Raises NotReady for one that is cut short, Damaged for anything but what `bundle_bytes` makes.
    """

    def look(file: IO[bytes], size_bytes: int, path: Path) -> None:
        head = file.read(reading.LARGEST_JSON_BYTES + LARGEST_NAME)
        listing, size = _listing(head, path)
        length = _start(size) + listing.size_bytes + END_BYTES
        file.seek(max(size_bytes - struct.calcsize(END_FORM), 0))
        is_complete = file.read(len(END)) == END
        if size_bytes < length and not is_complete:
            raise _cut_short(f"has {size_bytes} bytes of {length}", path)
        if size_bytes != length:
            raise _damaged(f"has {size_bytes} bytes, its own list makes {length}", head, path)
        if before:
            before(listing, lambda name: _member(file, listing, _start(size), name, path))

    content = reading.read(path, limit_bytes=limit_bytes, look=look)
    if len(content) <= reading.READ_AT_ONCE_BYTES:
        look(io.BytesIO(content), len(content), path)
    listing, size = _listing(content, path)
    start = _start(size)
    members = {LISTING: content[start - size : start]}
    for member in listing.members:
        start += struct.calcsize(LOCAL_FORM) + len(member.name)
        members[member.name] = content[start : start + member.size_bytes]
        start += member.size_bytes
        if reading.sha256(members[member.name]) != member.sha256:
            raise _damaged(f"holds {member.name} with another sha256 than it lists", content, path)
    _check_bytes(content, members, path)
    del members[LISTING]
    return Bundle(listing.federation, members, reading.sha256(content))


def _start(listing_bytes: int) -> int:
    """Where the members of a bundle begin, after its list."""
    return struct.calcsize(LOCAL_FORM) + len(LISTING) + listing_bytes


def _member(file: IO[bytes], listing: Listing, start: int, name: str, path: Path) -> bytes:
    """One small member of an open bundle. Raises Damaged unless it has the digest that the bundle lists."""
    for member in listing.members:
        start += struct.calcsize(LOCAL_FORM) + len(member.name)
        if member.name == name:
            file.seek(start)
            content = file.read(min(member.size_bytes, reading.LARGEST_JSON_BYTES))
            if reading.sha256(content) != member.sha256:
                raise _damaged(f"holds {name} with another sha256 than it lists", b"", path)
            return content
        start += member.size_bytes
    return b""


def _listing(content: bytes, path: Path) -> tuple[Listing, int]:
    """bundle.json and its size, from the head of a bundle."""
    head = struct.calcsize(LOCAL_FORM) + len(LISTING)
    if not content.startswith(LOCAL[: len(content)]):
        raise _damaged("is not a bundle", content, path)
    if len(content) < head:
        raise _cut_short(f"has {len(content)} bytes, not even its own list", path)
    size = int(struct.unpack_from(LOCAL_FORM, content)[8])
    if content[head - len(LISTING) : head] != LISTING.encode() or size > reading.LARGEST_JSON_BYTES:
        raise _damaged(f"is not a bundle: it does not begin with {LISTING}", content, path)
    if len(content) < head + size:
        raise _cut_short(f"has {len(content)} bytes, not even its own list", path)
    try:
        listing = Listing.model_validate(reading.parse_json(content[head : head + size]))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise _damaged(f"has a list that is none: {key}: {first['msg']}", content, path) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(f"has a list that is not strict JSON: {error}", content, path) from None
    names = [member.name for member in listing.members]
    if names != sorted(set(names)) or LISTING in names:
        raise _damaged("lists a file twice, or out of order", content, path)
    return listing, size


def _check_bytes(content: bytes, members: Mapping[str, bytes], path: Path) -> None:
    """Raise Damaged, naming the member, unless these are the bytes of a bundle of these members."""
    names = [*(name for name in members for _ in range(2)), *members, "the end of its directory"]
    start = 0
    for name, piece in zip(names, _archive(members), strict=True):
        if content[start : start + len(piece)] != piece:
            found = f"has {name} as no plain stored file: a link, a folder, compressed, encrypted or renamed"
            raise _damaged(found, content, path)
        start += len(piece)


def _archive(members: Mapping[str, bytes]) -> Iterator[bytes]:
    """A ZIP's bytes: a header and the content of each member; then an entry for each, and the directory's end."""
    entries, offset = [], 0
    for name, content in members.items():
        about = (zlib.crc32(content), len(content), len(content), len(name), 0)
        stored = (VERSION, 0, 0, 0, FIRST_OF_1980)
        numbers = (UNIX | VERSION, *stored, *about, 0, 0, 0, PLAIN_FILE, offset)
        entries.append(struct.pack(CENTRAL_FORM, CENTRAL, *numbers) + name.encode())
        header = struct.pack(LOCAL_FORM, LOCAL, *stored, *about) + name.encode()
        yield header
        yield content
        offset += len(header) + len(content)
    yield from entries
    yield struct.pack(END_FORM, END, 0, 0, len(entries), len(entries), sum(map(len, entries)), offset, 0)


def _damaged(found: str, content: bytes, path: Path) -> Problem:
    is_text = b"\r\n" in content[struct.calcsize(LOCAL_FORM) : 200]  # the list begins there, with plain line ends
    hint = "; its line ends were changed on the way, as by a text-mode transfer" if is_text else ""
    return Damaged(f"{path.name} {found}{hint}", where=path, mend=PACK_AGAIN)


def _cut_short(found: str, path: Path) -> Problem:
    message = f"{path.name} {found}: still arriving, or cut short"
    return NotReady(message, where=path, mend="wait until all of it is here, or carry it again")
