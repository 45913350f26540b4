"""Fuzzing what reads the files of others: arbitrary bytes, and sound files with something changed in them.

Only a Problem of the exit codes 3 to 6 may come of it, soon and in little memory. In CI the examples are few and the
same in every run; FEDCOLLM_FUZZ_EXAMPLES=20000 tries so many new ones of each test.
"""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builders import make_workspace
from secure_rounds import masked_round
from stages.artefacts import adapter_files, arrays
from stages.artefacts.lineage import check_belongs, place_of
from stages.artefacts.reading import Artefact, read_artefact
from stages.exchange import bundles, parcel_checks, parcel_kinds, parcels
from stages.federation.run import run
from stages.files import reading
from stages.parties import roster_files, signatures
from stages.parties.party import Party
from stages.runtime.errors import Damaged, Problem
from stages.secagg import masking, reveals
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST
from stages.workspace.paths import Workspace

EXAMPLES = int(os.environ.get("FEDCOLLM_FUZZ_EXAMPLES", "0"))
fuzzed = settings(
    max_examples=EXAMPLES or 150,
    derandomize=not EXAMPLES,
    database=None,
    deadline=timedelta(seconds=5),
    suppress_health_check=list(HealthCheck),
)
MOST_MEMORY = 50 << 20
KINDS_OF_PROBLEM = (3, 4, 5, 6)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, base_models: Path) -> Workspace:
    """A secure federation with a finished round, and in round 2 the broadcast as in plain mode: readable."""
    folder = make_workspace(tmp_path_factory.mktemp("fuzzed") / "study", base_models)
    text = (folder / "fedcollm.toml").read_text().replace("steps = 6", "steps = 1").replace("steps = 5", "steps = 1")
    (folder / "fedcollm.toml").write_text(text.replace("[evaluation]", '[aggregation]\nmode = "secure"\n[evaluation]'))
    (folder / "machine.toml").write_text('secrets = "../secrets"\n')
    run(Workspace(folder), rounds=range(1, 2), scores=False)
    return Workspace(folder)


@pytest.fixture(scope="module", autouse=True)
def measured() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def attempt(read: Callable[[], object]) -> None:
    """Read: it ends well, or as a problem that a script can act on."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        read()
    except Problem as problem:
        assert problem.exit_code in KINDS_OF_PROBLEM, problem  # noqa: PT017
    assert tracemalloc.get_traced_memory()[1] - before < MOST_MEMORY


# --- what is tried

TOKENS = [
    *(b"", b"\0", b"{", b"}", b"[", b"]", b'"', b"\\", b"\\ud800", b"NaN", b"1e999", b"-1", b"1" * 5000, b"null"),
    *(b"[" * 3000, b'{"a":' * 3000, b"true", b"\r\n", b"\xff", b"\xed\xa0\x80", b"..", b"/", b"__metadata__", b"F64"),
    *(b"\xff" * 8, b"\x00" * 8, b"PK\x03\x04", b"0.5", b"18446744073709551616"),
]
TEXT = st.text(st.sampled_from('ab01_.-/\\"\n\0\x1b\u00e9\u202e\ud800'), max_size=8) | st.sampled_from(
    ["0" * 64, "x" * 300]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**31, 2**53, 2**64, 10**400, -1, 0, 0.5])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with a few of its bytes replaced, removed or repeated; or anything else."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 0, 1, 1, 8, 40, 1 << 20])))
        piece = draw(st.sampled_from(TOKENS) | st.binary(max_size=12) | st.just(content[start : start + 64] * 2))
        content = content[:start] + piece + content[end:]
    return content


@st.composite
def changed_json(draw: st.DrawFn, value: Any) -> Any:
    """The value with one part of it, however deep, replaced, removed or renamed."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(JSON)
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    key, inner = draw(st.sampled_from(items))
    what = draw(st.integers(0, 7))
    if isinstance(value, list):
        new = [] if what == 0 else [inner, inner] if what == 1 else [draw(changed_json(inner))]
        return [*value[:key], *new, *value[key + 1 :]]
    rest = {name: other for name, other in value.items() if name != key}
    if what == 0:
        return rest
    return rest | ({draw(TEXT): inner} if what == 1 else {key: draw(changed_json(inner))})


def json_file(content: bytes) -> st.SearchStrategy[bytes]:
    """A JSON file changed in its bytes or in its meaning."""
    return changed(content) | changed_json(json.loads(content)).map(lambda value: json.dumps(value).encode())


@st.composite
def safetensors_file(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file changed in its bytes, or in what its header means, with a length that fits."""
    if draw(st.booleans()):
        return draw(changed(content))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length]) | draw(st.sampled_from([{}, {"__metadata__": {"format": "pt"}}]))
    new = json.dumps(draw(changed_json(header))).encode()
    return len(new).to_bytes(8, "little") + new + content[8 + length :]


# --- the readers


@fuzzed
@given(content=st.binary(max_size=300) | json_file(b'{"a": {"b": [1, 2.5, "x"], "c": null}}'))
def test_json(content: bytes, study: Workspace) -> None:
    path = study.root.parent / "x.json"
    path.write_bytes(content)

    def read() -> None:
        value, found = reading.read_json(path)
        assert found == content
        reading.json_bytes(value).decode()  # what was read can be written

    attempt(read)


@fuzzed
@given(data=st.data())
def test_adapters(data: st.DataObject, study: Workspace) -> None:
    sound = read_artefact(study.broadcast(1))
    expected = adapter_files.layout_of(adapter_files.read_adapter(sound, None, study.agreement.slm.lora))
    contents = {
        ADAPTER_WEIGHTS: data.draw(safetensors_file(sound.contents[ADAPTER_WEIGHTS])),
        ADAPTER_CONFIG: sound.contents[ADAPTER_CONFIG],
    }
    if data.draw(st.integers(0, 3)) == 0:
        contents = sound.contents | {ADAPTER_CONFIG: data.draw(json_file(sound.contents[ADAPTER_CONFIG]))}
    layout = data.draw(st.sampled_from([None, expected]))
    artefact = Artefact(sound.path, sound.manifest, sound.signed, sound.sha256, contents)

    def read() -> None:
        tensors = adapter_files.read_adapter(artefact, layout, study.agreement.slm.lora)
        assert layout is None or adapter_files.layout_of(tensors) == layout
        assert all(tensor.dtype == np.float32 and np.isfinite(tensor).all() for tensor in tensors.values())

    attempt(read)


@fuzzed
@given(
    content=safetensors_file(arrays.array_bytes("y", np.arange(9, dtype=np.uint32)))
    | safetensors_file(arrays.array_bytes("y", np.ones((3, 3), np.uint8)))
)
def test_arrays(content: bytes) -> None:
    def read() -> None:
        found = arrays.read_array(content, Path("x.safetensors"), name="y", kind="U32", shape=(9,))
        assert (found.dtype, found.shape) == (np.uint32, (9,))

    attempt(read)


@fuzzed
@given(data=st.data())
def test_manifests(data: st.DataObject, study: Workspace) -> None:
    place = data.draw(st.sampled_from([study.broadcast(1), study.client_update(1, 2), study.close(1)]))
    folder = study.root.parent / "exchange" / "round-0001" / place.name
    folder.mkdir(parents=True, exist_ok=True)
    for path in place.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    signed = data.draw(json_file((place / MANIFEST).read_bytes()))
    (folder / MANIFEST).write_bytes(signed)
    if data.draw(st.booleans()):  # by its maker, who does not keep to the rules
        party = "client-2" if place.name == "client-2" else "server"
        (folder / f"{MANIFEST}.sig").write_bytes(signatures.sign(signed, stage_of(place.name), identity(study, party)))

    def read() -> None:
        artefact = read_artefact(folder)
        place_of(artefact.manifest, study)
        client = 2 if place.name == "client-2" else None
        stage = stage_of(place.name)
        check_belongs(artefact, by=Party.server(study), stage=stage, round=1, client=client)

    attempt(read)


def stage_of(name: str) -> Any:
    return "client-train" if name.startswith("client") else name


def identity(study: Workspace, party: str) -> Ed25519PrivateKey:

    return Party(study, party).keys.identity


@fuzzed
@given(data=st.data())
def test_signatures(data: st.DataObject, study: Workspace) -> None:
    key, path = Ed25519PrivateKey.generate(), study.root.parent / "signed.json"
    sound = signatures.sign(b"content", "keys", key)
    found = data.draw(json_file(sound))
    path.with_name("signed.json.sig").write_bytes(found)
    public = key.public_key().public_bytes_raw()

    def read() -> None:
        signatures.check(b"content", "keys", public, path, "client 2")
        assert json.loads(found) == json.loads(sound)

    attempt(read)


@fuzzed
@given(data=st.data())
def test_rosters_and_keys(data: st.DataObject, study: Workspace) -> None:
    is_federation = data.draw(st.booleans())
    sound = study.federation if is_federation else study.public_keys(2)
    folder = study.root.parent / "exchange" / "keys"
    folder.mkdir(parents=True, exist_ok=True)
    content = data.draw(json_file(sound.read_bytes()))
    signer, kind = identity(study, "server" if is_federation else "client-2"), "federation" if is_federation else "keys"
    (folder / sound.name).write_bytes(content)
    (folder / f"{sound.name}.sig").write_bytes(signatures.sign(content, kind, signer))
    attempt(lambda: (roster_files.read_federation if is_federation else roster_files.read_keys)(folder / sound.name))


@fuzzed
@given(data=st.data())
def test_bundles(data: st.DataObject, study: Workspace) -> None:
    parcel = data.draw(st.sampled_from([parcel_kinds.Parcel("client", 1, 2), parcel_kinds.Parcel("keys", client=2)]))
    members = {parcel.name(study, name): file for name, file in parcels.collected(parcel, study).items()}
    path = study.root.parent / "x.fedcollm"
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(changed(bundles.bundle_bytes("tiny", members))))
    else:  # packed by somebody who changed a file, as a forger would
        name = data.draw(st.sampled_from(sorted(members)))
        members[name] = data.draw(json_file(members[name]) if name.endswith(".json") else changed(members[name]))
        path.write_bytes(bundles.bundle_bytes("tiny", members))

    def read() -> None:
        bundle = bundles.read_bundle(path)
        for found, contents in parcels.sorted_out(bundle.members, study, path).items():
            parcel_checks.check(found, contents, study, path)

    attempt(read)


@fuzzed
@given(data=st.data())
def test_sealed_shares_and_reveals(data: st.DataObject) -> None:
    made = masked_round([1, 2, 3], size=4)
    row = made.masked[1].rows[1]
    found = np.frombuffer(data.draw(changed(row.tobytes())), np.uint8)
    box = X25519PrivateKey.generate()
    shares = made.reveals([1, 2, 3], by=[2])[2]
    sealed = reveals.seal_reveal(shares, client=2, server=box.public_key().public_bytes_raw(), close_sha256="0" * 64)
    revealed = data.draw(changed(sealed))

    def open_row() -> None:
        digest = made.masked[1].y_sha256
        masking.open_row(found, made.round, dealer=1, holder=2, secret=made.keys[2], y_sha256=digest)
        assert found.tobytes() == row.tobytes()

    def open_reveal() -> None:
        reveals.open_reveal(revealed, client=2, box=box, close_sha256="0" * 64, survivors=3, missing=0)
        assert revealed == sealed

    attempt(open_row)
    attempt(open_reveal)


# --- what it has found


@pytest.mark.parametrize("metadata", ["null", '"pt"', "[]"])
def test_metadata_that_is_no_object_is_damage(metadata: str) -> None:
    sound = arrays.array_bytes("y", np.arange(9, dtype=np.uint32))
    length = int.from_bytes(sound[:8], "little")
    header = sound[8 : 8 + length].rstrip()[:-1] + f', "__metadata__": {metadata}}}'.encode()
    content = len(header).to_bytes(8, "little") + header + sound[8 + length :]
    with pytest.raises(Damaged, match="carries unknown metadata"):
        arrays.read_array(content, Path("x.safetensors"), name="y", kind="U32", shape=(9,))
