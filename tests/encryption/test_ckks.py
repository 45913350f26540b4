"""ckks: sums against NumPy's in float64, the noise that they are told under, and ciphertexts that are none of ours."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import tenseal

from stages.artefacts.sizes import CIPHERTEXT_BYTES, ciphertexts_of
from stages.encryption import ckks
from stages.parties.encryption_keys import DEGREE, PRIME_BITS, SLOTS
from stages.runtime.errors import BadNumbers, Damaged

SEED = bytes(range(32))


def new_key() -> Any:
    return tenseal.context(
        tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=DEGREE, coeff_mod_bit_sizes=list(PRIME_BITS), n_threads=1
    )


@pytest.fixture(scope="module")
def secret() -> Any:
    return new_key()


@pytest.fixture(scope="module")
def public(secret: Any) -> Any:
    found = secret.copy()
    found.make_context_public()
    return tenseal.context_from(found.serialize(save_galois_keys=False, save_relin_keys=False), n_threads=1)


def updates(clients: int, size: int, *, rms: float = 1e-3) -> list[np.ndarray]:
    rng = np.random.default_rng(clients)
    common = rng.standard_t(4, size)
    return [(rms * (common + rng.standard_t(4, size))).astype(np.float32) for _ in range(clients)]


def summed(
    each: list[np.ndarray], weights: list[float], public: Any, precision: ckks.Precision, *, bound: float = 8.0
) -> list[Any]:
    total: list[Any] = []
    for update, weight in zip(each, weights, strict=True):
        ckks.check_fits(update, weight, bound, precision)
        total = ckks.add(total, list(ckks.encrypted(update, weight, bound, public, precision)), public, precision)
    return total


def opened(
    total: list[Any], count: int, secret: Any, precision: ckks.Precision, *, bound: float = 8.0, seed: bytes = SEED
) -> np.ndarray:
    mine = [ckks.read(one.serialize(), secret, precision) for one in total]
    return ckks.opened(ckks.decrypted(mine), count, bound, seed, precision).mean


@pytest.mark.parametrize("size", [1, SLOTS - 2, SLOTS - 1, 10_000])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, 0.02, 0.5]], ids=["alike", "by samples"])
def test_what_is_opened_is_the_mean_to_a_hundred_thousandth(
    size: int, weights: list[float], secret: Any, public: Any
) -> None:
    precision, each = ckks.Precision(len(weights), 5, size), updates(len(weights), size)
    total = summed(each, weights, public, precision)
    assert len(total) == ciphertexts_of(size) == math.ceil((size + 1) / (SLOTS - 1))
    found = opened(total, len(weights), secret, precision)
    expected = np.average([one.astype(np.float64) for one in each], axis=0, weights=weights)
    assert found.dtype == np.float32
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_a_sum_of_as_many_clients_as_there_can_be_does_not_overflow(secret: Any, public: Any) -> None:
    """Every number as large as allowed, at every client: the sum is 256 of the bound, of which count and scale tell."""
    precision, most = ckks.Precision(256, 5, 3), np.array([8, -8, 8], np.float32)
    one = list(ckks.encrypted(most, 1.0, 8.0, public, precision))
    total: list[Any] = []
    for _ in range(256):
        total = ckks.add(total, one, public, precision)
    np.testing.assert_allclose(opened(total, 256, secret, precision), most, rtol=1e-6)
    assert precision.scale * 256 == 2.0 ** (sum(PRIME_BITS[:-1]) - 2)  # a quarter of the modulus, which has signs


def test_encrypting_adds_less_noise_than_is_reckoned_with(secret: Any, public: Any) -> None:
    precision = ckks.Precision(2, 5, 1)
    spread = []
    for _ in range(20):
        zero = tenseal.ckks_vector(public, [0.0] * SLOTS, scale=precision.scale).serialize()
        spread.append(float(np.std(ckks.read(zero, secret, precision).decrypt())) * precision.scale)
    assert ckks.NOISE / 4 < np.mean(spread) < max(spread) < ckks.NOISE / 2


def test_a_sum_is_told_under_the_noise_that_hides_the_key(secret: Any, public: Any) -> None:
    """2^12 sqrt(2) e of noise, over 5 rounds of 3 ciphertexts of 4096 numbers, within 2^-40 of what tells nothing."""
    precision = ckks.Precision(2, 5, 10_000)
    assert precision.deviation == pytest.approx(2**12 * 2**0.5 * 5 * 3 * 4096 / (2 * 2**-40) / 2**117, rel=1e-12)
    bound = 2.0**30  # so that the noise is far above the steps of float32
    each = updates(2, 10_000, rms=1.0)
    total = summed(each, [1.0, 1.0], public, precision, bound=bound)
    expected = np.mean([one.astype(np.float64) for one in each], axis=0)
    slots = ckks.decrypted([ckks.read(one.serialize(), secret, precision) for one in total])
    told = [ckks.opened(slots, 2, bound, bytes([n]) * 32, precision).mean - expected for n in range(3)]
    for error in told:
        assert np.std(error) == pytest.approx(bound * precision.deviation / 2, rel=0.05)
    assert abs(np.corrcoef(told)[0, 1]) < 0.05
    again = ckks.opened(slots, 2, bound, bytes([0]) * 32, precision).mean - expected
    assert np.array_equal(again, told[0])


def test_an_update_or_a_mean_that_would_be_known_too_coarsely_is_refused(secret: Any, public: Any) -> None:
    precision, bound = ckks.Precision(2, 5, 1000), 8.0
    least = bound * precision.deviation / 1e-5
    fits = np.full(1000, 1.01 * least, np.float32)
    ckks.check_fits(fits, 1.0, bound, precision)
    with pytest.raises(BadNumbers, match="more than 1e-05 of it") as found:
        ckks.check_fits(fits, 0.5, bound, precision)
    assert "max_update_value below 8" in str(found.value.mend)
    # Two updates that nearly cancel out: what is left is as coarse as they are, and is less.
    for other, is_fine in ((-0.5 * fits, True), (-0.999 * fits, False)):
        total = summed([10 * fits, 10 * other], [1.0, 1.0], public, precision)
        if is_fine:
            np.testing.assert_allclose(opened(total, 2, secret, precision), 2.5 * fits, rtol=1e-4)
            continue
        with pytest.raises(BadNumbers, match=r"the mean is of .* would be known but to"):
            opened(total, 2, secret, precision)


@pytest.mark.parametrize(
    ("value", "said"), [(9.0, "allows 8"), (math.nan, "NaN or infinity"), (math.inf, "NaN or infinity")]
)
def test_an_update_that_does_not_fit_is_not_encrypted(value: float, said: str) -> None:
    update = np.array([1.0, value], np.float32)
    with pytest.raises(BadNumbers, match=said):
        ckks.check_fits(update, 1.0, 8.0, ckks.Precision(2, 5, 2))


def test_what_another_key_made_opens_to_no_count(secret: Any, public: Any) -> None:
    precision, each = ckks.Precision(2, 5, 10_000), updates(2, 10_000)
    ours = list(ckks.encrypted(each[0], 1.0, 8.0, public, precision))
    other = list(ckks.encrypted(each[1], 1.0, 8.0, new_key(), precision))
    for theirs, odd in ((other, 0), ([*ours[:2], other[2]], 2)):
        total = ckks.add(ckks.add([], ours, public, precision), theirs, public, precision)
        with pytest.raises(Damaged, match=f"not of 2 updates of this federation's key: its ciphertext {odd} counts"):
            opened(total, 2, secret, precision)


def test_a_sum_of_other_clients_than_it_names_or_with_values_that_none_may_send_is_damage(
    secret: Any, public: Any
) -> None:
    precision, each = ckks.Precision(3, 5, 100), updates(3, 100)
    total = summed(each[:2], [1.0, 1.0], public, precision)
    with pytest.raises(Damaged, match=r"not of 3 updates .* counts 2"):
        opened(total, 3, secret, precision)
    beyond = list(ckks.encrypted(np.full(100, 3.0, np.float32), 1.0, 1.0, public, precision))
    with pytest.raises(Damaged, match="values beyond 1, which no client may send"):
        opened(ckks.add([], [*beyond], public, precision), 1, secret, precision, bound=1.0)
    heavy = list(ckks.encrypted(each[0], 2.5, 8.0, public, precision))
    with pytest.raises(Damaged, match=r"1 clients weigh 2\.5"):
        opened(ckks.add([], heavy, public, precision), 1, secret, precision)


def test_seal_takes_no_parameters_of_less_than_128_bits_of_security() -> None:
    """218 bits at degree 8192: table 1 of the homomorphic encryption standard, for ternary secrets."""
    assert (DEGREE, sum(PRIME_BITS)) == (8192, 180)
    tenseal.context(tenseal.SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=[60, 60, 60, 38])
    with pytest.raises(ValueError, match="parameters are not set correctly"):
        tenseal.context(tenseal.SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=[60, 60, 60, 39])


def other_parameters(precision: ckks.Precision) -> bytes:
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=4096, coeff_mod_bit_sizes=[40, 40])
    return bytes(tenseal.ckks_vector(context, [1.0], scale=2.0**20).serialize())


def test_what_is_no_ciphertext_of_this_federation_is_refused(public: Any) -> None:
    precision = ckks.Precision(2, 5, 10)
    sound = tenseal.ckks_vector(public, [1.0] * SLOTS, scale=precision.scale).serialize()
    ckks.read(sound, public, precision)
    for content in (
        b"",
        b"\x80\x04K\x01.",
        sound[:-1000],
        sound + b"\0",
        random.Random(1).randbytes(5000),
        bytes(CIPHERTEXT_BYTES + 1),
        other_parameters(precision),
        tenseal.ckks_vector(public, [1.0] * SLOTS, scale=precision.scale / 2).serialize(),
        tenseal.ckks_vector(public, [1.0] * 7, scale=precision.scale).serialize(),
        tenseal.ckks_vector(public, [1.0] * 5000, scale=precision.scale).serialize(),
    ):
        with pytest.raises(Damaged, match="ciphertext"):
            ckks.read(content, public, precision)


def test_bytes_changed_at_random_are_refused_or_are_another_ciphertext(secret: Any, public: Any) -> None:
    """Whoever changes bytes can make other numbers of them; never an end of the program, and none that does not add."""
    precision = ckks.Precision(2, 5, 10)
    sound = tenseal.ckks_vector(public, [1.0] * SLOTS, scale=precision.scale).serialize()
    refused = 0
    for seed in range(300):
        rng, content = random.Random(seed), bytearray(sound)
        for _ in range(rng.choice([1, 1, 3, 20])):
            place = rng.randrange(200) if rng.random() < 0.7 else rng.randrange(len(content))
            content[place] = rng.randrange(256)
        try:
            total = ckks.add([ckks.read(sound, secret, precision)], [bytes(content)], secret, precision)
        except Damaged:
            refused += 1
        else:
            assert ckks.decrypted(total).shape == (1, SLOTS)
    assert 100 < refused < 300
