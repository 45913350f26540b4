"""A user's own files: read whole, through links, and never waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stages.files import locks, reading
from stages.report.findings import _lines
from stages.runtime.errors import Damaged


def test_a_pipe_a_device_or_a_folder_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "zero", tmp_path):
        with pytest.raises(Damaged, match="not a plain file"):
            reading.read_own(path)
    with pytest.raises(Damaged, match="pipe"):
        reading.check_plain(tmp_path)
    with pytest.raises(Damaged, match="pipe"), locks.held(tmp_path / "pipe"):
        pass


def test_a_link_to_a_file_is_followed_and_a_sparse_terabyte_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"1")
    (tmp_path / "link").symlink_to("rows")
    assert reading.read_own(tmp_path / "link") == b"1"
    os.truncate(tmp_path / "rows", 1 << 40)
    with pytest.raises(Damaged, match="bytes"):
        reading.read_own(tmp_path / "link")


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"step": 1, "slm_ft": "a"}', '{"wall_s": NaN}', "\udcff"])
def test_a_damaged_log_is_named_with_its_line(line: str, tmp_path: Path) -> None:
    log = tmp_path / "client-1/round-0001/client-train.jsonl"
    log.parent.mkdir(parents=True)
    log.write_bytes(b'{"inputs": {}}\n' + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(Damaged, match=r"client-1/round-0001/client-train\.jsonl is damaged: (line 2|it) is not"):
        _lines(log)


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"inputs": {}}\n{"step": 1, "sl')
    assert _lines(tmp_path / "log") == [{"inputs": {}}]


@pytest.mark.parametrize("path", ["/a/b/c", "/a", "/ab", "/", "/b"])
@pytest.mark.parametrize("top", ["/a", "/", "/a/b"])
def test_what_lies_below_a_folder_is_what_pathlib_says(path: str, top: str) -> None:
    one, folder = Path(path), Path(top)
    expected = str(one.relative_to(folder)) if one.is_relative_to(folder) else None
    assert reading.below(one, folder) == expected
