"""Updates as rules read them: side by side, never all in memory, and no file trusted that changes meanwhile."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from builders import random_adapter, sent, sign
from stages.aggregate import aggregate
from stages.aggregation import updates as reading_updates
from stages.aggregation.updates import Updates
from stages.artefacts.adapter_files import Tensors, weights_bytes
from stages.runtime.errors import BadNumbers, Damaged, NotReady, Problem
from stages.workspace.paths import Workspace

LAYOUT = {f"h.{i}.lora_{which}.weight": shape for i in (0, 1) for which, shape in (("A", (2, 6)), ("B", (5, 2)))}
THETA = random_adapter(LAYOUT, seed=99)
ADAPTERS = [random_adapter(LAYOUT, seed=k) for k in range(5)]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of seven numbers, which begin and end within tensors: seven of them."""
    monkeypatch.setattr(reading_updates, "BLOCK_BYTES", 1)
    monkeypatch.setattr(reading_updates, "FEWEST_NUMBERS", 7)


@pytest.fixture
def updates(tmp_path: Path) -> Updates:
    return sent(tmp_path, THETA, ADAPTERS, range(1, 6))


def flat(adapter: Tensors) -> np.ndarray:
    return np.concatenate([adapter[name].ravel() for name in sorted(adapter)])


def side_by_side(updates: Updates) -> np.ndarray:
    return np.concatenate([block.copy() for _, block in updates.blocks()], axis=1)


def test_blocks_hold_every_number_of_every_client_once(updates: Updates) -> None:
    places = [(place.start, block.shape) for place, block in updates.blocks()]
    assert places == [(7 * i, (5, 7)) for i in range(6)] + [(42, (5, 2))]  # 44 numbers
    np.testing.assert_array_equal(side_by_side(updates), [flat(adapter) for adapter in ADAPTERS])


def test_one_after_the_other_they_are_the_adapters(updates: Updates) -> None:
    for found, adapter in zip(updates.adapters(), ADAPTERS, strict=True):
        np.testing.assert_array_equal(flat(found), flat(adapter))
    again = updates.tensors(flat(ADAPTERS[1]))
    assert {name: tensor.tobytes() for name, tensor in again.items()} == {
        name: tensor.tobytes() for name, tensor in ADAPTERS[1].items()
    }


def otherwise_ordered(adapter: Tensors) -> bytes:
    """A sound safetensors file, with its tensors in the opposite order of their names."""
    header, numbers = {}, b""
    for name in sorted(adapter, reverse=True):
        content = adapter[name].tobytes()
        offsets = [len(numbers), len(numbers) + len(content)]
        header[name] = {"dtype": "F32", "shape": list(adapter[name].shape), "data_offsets": offsets}
        numbers += content
    described = json.dumps(header).encode()
    return struct.pack("<Q", len(described)) + described + numbers


def test_a_file_with_its_tensors_in_another_order_counts_as_any_other(tmp_path: Path) -> None:
    updates = sent(tmp_path, THETA, ADAPTERS, range(1, 6), write=otherwise_ordered)
    assert (updates.heads[0].path / WEIGHTS).read_bytes() != weights_bytes(ADAPTERS[0])
    np.testing.assert_array_equal(side_by_side(updates), [flat(adapter) for adapter in ADAPTERS])


def overwrite(path: Path, content: bytes) -> None:
    """Put as many other bytes into a file that is being read: at no time is it shorter."""
    assert len(content) == path.stat().st_size
    with path.open("r+b", buffering=0) as file:
        file.write(content)


def with_a_nan(adapter: Tensors) -> bytes:
    (first, tensor), *others = adapter.items()
    return weights_bytes({first: np.where(tensor == tensor.max(), np.float32("nan"), tensor), **dict(others)})


def with_another_shape(adapter: Tensors) -> bytes:
    return weights_bytes({name: tensor.T for name, tensor in adapter.items()})


def without_its_last_tensor(adapter: Tensors) -> bytes:
    return weights_bytes({name: adapter[name] for name in sorted(adapter)[:-1]})


@pytest.mark.parametrize(
    ("write", "problem", "said"),
    [
        (with_a_nan, BadNumbers, "holds NaN or infinity"),
        (with_another_shape, Damaged, r"has shape \[6, 2\], expected \[2, 6\]"),
        (without_its_last_tensor, Damaged, r"the adapter lacks h.1.lora_B.weight \(1 tensors missing\)"),
        (lambda adapter: b"\x80" + weights_bytes(adapter), Damaged, "is a pickle"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_as_where_it_is_read_whole(
    tmp_path: Path, write: Callable[[Tensors], bytes], problem: type[Problem], said: str
) -> None:
    updates = sent(tmp_path, THETA, ADAPTERS, range(1, 6), write=write)
    for read in (updates.blocks, updates.adapters):
        with pytest.raises(problem, match=said) as caught:
            list(read())
        assert caught.value.where == updates.heads[0].path / WEIGHTS


def test_nothing_is_made_of_a_file_that_changes_before_it_is_read_to_its_end(updates: Updates) -> None:
    path, blocks = updates.heads[2].path / WEIGHTS, updates.blocks()
    next(blocks)
    overwrite(path, path.read_bytes()[:-1] + b"\x7e")
    with pytest.raises(Damaged, match="is not the file its manifest names"):
        list(blocks)


def test_what_counts_is_what_was_read_and_hashed_not_what_lies_there_now(updates: Updates) -> None:
    path, blocks = updates.heads[2].path / WEIGHTS, updates.blocks()
    first = next(blocks)[1].copy()
    content = path.read_bytes()
    overwrite(path, content[:-176] + b"\0" + content[-175:])  # the first of 44 numbers
    found = np.concatenate([first, *(block.copy() for _, block in blocks)], axis=1)
    np.testing.assert_array_equal(found, [flat(adapter) for adapter in ADAPTERS])


def test_a_file_that_is_changed_and_put_back_is_noticed_too(updates: Updates) -> None:
    path = updates.heads[2].path / WEIGHTS
    before, blocks = path.read_bytes(), updates.blocks()
    next(blocks)
    overwrite(path, before[:-176] + b"\0" * 176)
    next(blocks)
    next(blocks)
    overwrite(path, before)
    with pytest.raises(NotReady, match="client 3's update was replaced while it was read"):
        list(blocks)


def test_a_file_that_is_cut_short_while_it_is_read_is_still_arriving(updates: Updates) -> None:
    path, blocks = updates.heads[2].path / WEIGHTS, updates.blocks()
    next(blocks)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(NotReady, match="still arriving, or cut short"):
        list(blocks)


def test_a_file_with_more_behind_its_numbers_is_refused_as_where_it_is_read_whole(updates: Updates) -> None:
    path = updates.heads[2].path / WEIGHTS
    size_bytes = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"more")
    for read in (updates.blocks, updates.adapters):
        with pytest.raises(Damaged, match=f"has {size_bytes + 4} bytes, its manifest says {size_bytes}"):
            list(read())


def test_a_folder_that_is_replaced_while_it_is_read_is_told_as_that(updates: Updates) -> None:
    folder = updates.heads[2].path
    (folder / WEIGHTS).write_bytes(weights_bytes(ADAPTERS[0]))
    sign(folder, steps=9)
    for read in (updates.blocks, updates.adapters):
        with pytest.raises(NotReady, match="client 3's update was replaced while it was read"):
            list(read())


@pytest.mark.parametrize("rule", ["median", "krum"])
def test_an_update_that_changes_under_a_rule_leaves_no_aggregate(
    rule: str, answered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.aggregation import rules

    path = answered / "exchange/round-0001/client-2" / WEIGHTS
    blocks = Updates.blocks

    def changing(updates: Updates):  # type: ignore[no-untyped-def]
        for number, block in enumerate(blocks(updates)):
            if number == 1:
                overwrite(path, path.read_bytes()[:-4] + b"\0\0\0\1")
            yield block

    monkeypatch.setattr(rules.Updates, "blocks", changing)
    workspace = Workspace(answered)
    settings = workspace.agreement.aggregation.model_copy(update={"rule": rule, "outliers": 0})
    object.__setattr__(workspace.agreement, "aggregation", settings)
    with pytest.raises(Damaged, match="is not the file its manifest names"):
        aggregate(workspace, round=1)
    assert not workspace.aggregate(1).exists()


def test_memory_does_not_grow_with_the_number_of_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_updates, "BLOCK_BYTES", 1 << 16)
    theta = {"h.0.lora_A.weight": np.zeros((16, 1 << 12), np.float32)}  # 256 KiB
    adapters = [random_adapter({"h.0.lora_A.weight": (16, 1 << 12)}, seed=k) for k in range(24)]
    peaks = {}
    for count in (3, 24):
        (tmp_path / str(count)).mkdir()
        updates = sent(tmp_path / str(count), theta, adapters[:count], range(1, count + 1))
        tracemalloc.start()
        for _ in updates.blocks():
            pass
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[24] < 1.5 * peaks[3]  # 24 adapters are 6 MiB, a block is 64 KiB
