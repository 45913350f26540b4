"""An alignment as a file, which stays where it was made: each of its parties can make it again, byte for byte.

One safetensors file. Its metadata holds one key, "alignment", whose value is JSON: FORMAT, the method, and the sha256
of the vocabulary files of teacher and student. Its tensors, teacher and student: int32 [rows], as Alignment has them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from stages.artefacts.tensor_files import bad, read_header, told_in
from stages.artefacts.vocabulary_files import Vocabulary
from stages.distillation.alignment import OTHER, Alignment

FORMAT = "fedcollm-alignment/1"


def alignment_bytes(alignment: Alignment, teacher: Vocabulary, student: Vocabulary) -> bytes:
    """The file, byte for byte the same for the same contents."""
    told = _told(alignment.method, teacher, student)
    tensors = {"teacher": alignment.teacher, "student": alignment.student}
    return safetensors.numpy.save(tensors, metadata={"alignment": json.dumps(told, sort_keys=True)})


def parse_alignment(content: bytes, path: Path, teacher: Vocabulary, student: Vocabulary) -> Alignment:
    """The contents of such a file. Raises Damaged unless it is exactly of this form, and of these vocabularies."""
    header = read_header(content, path)
    told = told_in(header, "alignment")
    method: Any = told.get("method")
    if told != _told(method, teacher, student):
        raise bad(path, "is not an alignment of these two vocabularies")
    expected = {"teacher": ("I32", [teacher.rows]), "student": ("I32", [student.rows])}
    if {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} != expected:
        raise bad(path, "has other arrays than an alignment")
    try:
        alignment = Alignment(method, **safetensors.numpy.load(content))
    except safetensors.SafetensorError as error:
        raise bad(path, f"is not a sound safetensors file: {error}") from error
    outcomes = teacher.rows if method == "leading" else student.rows
    for side in (alignment.teacher, alignment.student):
        if len(side) and (np.min(side) < OTHER or np.max(side) >= outcomes):
            raise bad(path, "names a token that there is not")
    return alignment


def _told(method: Any, teacher: Vocabulary, student: Vocabulary) -> dict[str, Any]:
    return {"format": FORMAT, "method": method, "teacher": teacher.sha256, "student": student.sha256}
