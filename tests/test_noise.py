import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enat.runtime.noise import noise, philox4x32

# Known-answer vectors of the Random123 library: counter, key, result.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[np.ndarray]:
    return [np.array(int(word, 16), np.uint64) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter: str, key: str, expected: str) -> None:
    assert [int(word) for word in philox4x32(words(counter), words(key))] == [int(word) for word in words(expected)]


@given(st.integers(0, 2**64 - 1), st.integers(0, 1023), st.integers(0, 255))
def test_noise_is_a_function_of_seed_step_and_position(seed: int, step: int, position: int) -> None:
    (choice,), (confidence,) = noise([seed, seed ^ 1], [step], 256)
    r0, r1, _, _ = philox4x32(
        [np.array(position, np.uint64), np.array(step, np.uint64), np.uint64(0), np.uint64(0)],
        [np.array(seed % 2**32, np.uint64), np.array(seed // 2**32, np.uint64)],
    )
    assert choice[0, position] == (int(r0) >> 8) * 2.0**-24
    expected = -np.log(-np.log(((int(r1) >> 9) + 0.5) * 2.0**-23))
    assert confidence[0, position] == np.float32(expected)
    assert np.array_equal(choice[1:], noise([seed ^ 1], [step], 256)[0][0])


@pytest.mark.parametrize("images", [1, 3, 60, 200])
def test_steps_may_be_drawn_together(images: int) -> None:
    """All at once, some, or each for itself, by how many numbers they are."""
    together = noise(range(images), range(9), 256)
    alone = [noise(range(images), [step], 256) for step in range(9)]
    for which in range(2):
        assert np.array_equal(together[which], np.concatenate([one[which] for one in alone]))


def test_distributions() -> None:
    choice, confidence = noise(range(400), [3], 256)
    assert choice.dtype == confidence.dtype == np.float32
    assert choice.min() >= 0 and choice.max() < 1
    assert abs(choice.mean() - 0.5) < 0.005
    assert abs(confidence.mean() - np.euler_gamma) < 0.02
    assert abs(confidence.var() - np.pi**2 / 6) < 0.05
