"""Every file that a federation leaves is the same, byte for byte, when it is run again on the same machine.

With secrets drawn from a fixed stream, this is so of keys, masks, noise and ledgers too. Of each command in plain mode
it is held by tests/cli/test_write_failures.py; of other ways to drive a federation, by the tests of each.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from builders import ROOT

LIBRARIES = ["stages.training.training", "stages.evaluation.scoring", "stages.privacy.dp_sgd"]
ROUND, SERVER, KEYS = "exchange/round-0002", "private/server/round-0002", "private/client-1/keys.json"


@pytest.mark.slow
def test_a_secure_and_private_federation_leaves_the_same_bytes_again() -> None:
    name = "secure and private"
    code = f"import digests; digests.main([{name!r}] * 2, libraries={LIBRARIES})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    first, again = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    assert first == again
    files = {line.partition(f"{name}: ")[2] for line in first}
    assert len(files) == len(first)
    assert files >= {f"{ROUND}/client-1/masked.safetensors", f"{ROUND}/reveal-1/reveal.bin", KEYS}
    assert files >= {f"{SERVER}/aggregate/adapter_model.safetensors", f"{SERVER}/llm/manifest.json"}
    assert files >= {"private/client-1/privacy-ledger.jsonl", "results/round-0002/slm.json"}
