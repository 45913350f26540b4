"""Every file that a federation leaves is the same, byte for byte, when it is run again on the same machine.

With secrets drawn from a fixed stream, this is so of keys, masks, noise and ledgers too. Of each command in plain mode
it is held by tests/cli/test_write_failures.py; of other ways to drive a federation, by the tests of each.
"""

from __future__ import annotations

import contextlib
import io

import pytest

from processes import call_together

LIBRARIES = ["stages.training.training", "stages.evaluation.scoring", "stages.privacy.dp_sgd"]
ROUND, SERVER, KEYS = "exchange/round-0002", "private/server/round-0002", "private/client-1/keys.json"


def lines(_: object, name: str) -> list[str]:
    """What tests/digests.py prints of a federation that is played twice."""
    import digests

    with contextlib.redirect_stdout(io.StringIO()) as out:
        digests.main([name] * 2, libraries=LIBRARIES)
    return out.getvalue().splitlines()


@pytest.mark.slow
def test_a_secure_and_private_federation_leaves_the_same_bytes_again() -> None:
    name = "secure and private"
    [printed] = call_together(1, lines, name)
    first, again = printed[: len(printed) // 2], printed[len(printed) // 2 :]
    assert first == again
    files = {line.partition(f"{name}: ")[2] for line in first}
    assert len(files) == len(first)
    assert files >= {f"{ROUND}/client-1/masked.safetensors", f"{ROUND}/reveal-1/reveal.bin", KEYS}
    assert files >= {f"{SERVER}/aggregate/adapter_model.safetensors", f"{SERVER}/llm/manifest.json"}
    assert files >= {"private/client-1/privacy-ledger.jsonl", "results/round-0002/slm.json"}
