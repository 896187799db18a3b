import copy
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedclaw.errors import PrivacyError
from fedclaw.privacy.noise import GaussianSource
from tests.chance import counts_fit, frequencies_fit, is_standard_normal, scale_is_right, uncorrelated

N = 200_000


def test_distribution_and_scale() -> None:
    values = GaussianSource().perturb_(torch.zeros(N), 3.0).double().numpy()
    assert is_standard_normal(values / 3.0)
    assert scale_is_right(values, 3.0)
    assert uncorrelated(values[:-1], values[1:])
    assert uncorrelated(values[: N // 2], values[N // 2 :])
    assert uncorrelated(np.abs(values[: N // 2]), np.abs(values[N // 2 :]))


@pytest.mark.parametrize("wrong", [0.9, 1.1])
def test_the_scale_test_rejects_a_scale_that_is_a_tenth_off(wrong: float) -> None:
    values = GaussianSource().perturb_(torch.zeros(20_000), 3.0 * wrong).double().numpy()
    assert not scale_is_right(values, 3.0)


def test_two_sources_are_independent_and_the_test_sees_shared_ones() -> None:
    first, second = (GaussianSource().standard(N).numpy() for _ in range(2))
    assert uncorrelated(first, second)
    shared = [GaussianSource(insecure_fixed_key_for_tests=bytes(32)).standard(N).numpy() for _ in range(2)]
    assert not uncorrelated(*shared)
    assert np.array_equal(*shared)


def test_one_source_never_repeats() -> None:
    """The halves of a draw each on their own: a pair's cosine and sine have one radius, and at an eighth of a turn
    they are one float32 (in 1 draw of 300)."""
    source = GaussianSource()
    draws = np.array([source.standard(1000).numpy() for _ in range(100)])
    for values in (draws[:, :500], draws[:, 500:]):
        assert len(np.unique(values)) == values.size


@pytest.mark.parametrize("count", [0, 1, 2, 3, 32767, 32768, 32769, 65537])
def test_any_count_is_filled_with_finite_numbers(count: int) -> None:
    values = GaussianSource().standard(count)
    assert values.shape == (count,)
    assert values.dtype == torch.float64
    assert bool(values.isfinite().all())
    assert not bool((values == 0).any())


def test_shape_type_and_device() -> None:
    values = GaussianSource().perturb_(torch.zeros(3, 4, 5, device="cpu"), 2.0)
    assert values.shape == (3, 4, 5)
    assert values.dtype == torch.float32
    assert GaussianSource().perturb_(torch.zeros(()), 1.0).shape == ()


def test_add_keeps_values_and_scales_noise() -> None:
    values = [torch.full((100, 50), 7.0), torch.zeros(0), torch.full((3000,), -2.0)]
    source = GaussianSource()
    noisy = [source.perturb_(value.clone(), 4.0) for value in values]
    assert [tensor.shape for tensor in noisy] == [tensor.shape for tensor in values]
    rests = [(new.double() - old.double()).flatten().numpy() for new, old in zip(noisy, values, strict=True)]
    assert scale_is_right(np.concatenate(rests), 4.0)
    assert uncorrelated(rests[0][:3000], rests[2])


def test_noise_is_added_in_place() -> None:
    values = torch.full((100,), 7.0)
    assert GaussianSource().perturb_(values, 4.0) is values
    assert len(values.unique()) > 1


def test_without_noise_values_are_exact() -> None:
    values = [torch.randn(17), torch.randn(2, 3)]
    for value in values:
        assert torch.equal(GaussianSource().perturb_(value.clone(), 0.0), value)


@pytest.mark.parametrize("q", [0.0, 0.01, 0.5, 0.999, 1.0])
def test_bernoulli_rate(q: float) -> None:
    mask = GaussianSource().bernoulli(N, q)
    assert mask.shape == (N,)
    assert counts_fit(mask.sum(), N, q)


def test_permutation_is_one_and_every_place_is_equally_likely() -> None:
    source = GaussianSource()
    assert sorted(source.permutation(40_000)) == list(range(40_000))
    firsts = np.bincount([source.permutation(5)[0] for _ in range(5000)], minlength=5)
    assert frequencies_fit(firsts)


def test_a_source_cannot_be_copied_or_sent() -> None:
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="never copied"):
            duplicate(GaussianSource())


def _draw_after_fork(source: GaussianSource, answer: "multiprocessing.Queue[str]") -> None:
    try:
        source.standard(1)
        answer.put("drew")
    except PrivacyError as error:
        answer.put(str(error))


def test_a_source_does_not_work_after_a_fork() -> None:
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    child = context.Process(target=_draw_after_fork, args=(GaussianSource(), answer))
    child.start()
    assert "came over a fork" in answer.get(timeout=30)
    child.join()


def test_wrong_arguments_are_refused() -> None:
    source = GaussianSource()
    for std in (-1.0, float("nan"), float("inf")):
        with pytest.raises(PrivacyError):
            source.perturb_(torch.zeros(1), std)
    for q in (-0.1, 1.1, float("nan")):
        with pytest.raises(PrivacyError):
            source.bernoulli(1, q)
    with pytest.raises(PrivacyError, match="32 bytes"):
        GaussianSource(insecure_fixed_key_for_tests=os.urandom(16))


def test_the_key_is_not_shown() -> None:
    assert repr(GaussianSource(insecure_fixed_key_for_tests=b"k" * 32)) == "GaussianSource()"


def test_words_are_the_keystream_and_never_repeat() -> None:
    key = bytes(range(32))
    words = GaussianSource(insecure_fixed_key_for_tests=key).words(100_000)
    counter = bytes(15) + b"\x02"
    expected = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor().update(bytes(800_000))
    assert words.tobytes() == expected
    assert len(np.unique(words)) == len(words)


def test_the_noise_of_a_key_does_not_depend_on_whose_logarithm_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's where the processor makes it fast, else torch's: the same numbers but for the last digits."""
    made = []
    for fast in (False, True):
        monkeypatch.setattr("fedclaw.privacy.noise._NUMPY_HAS_FAST_LOG", fast)
        made.append(GaussianSource(insecure_fixed_key_for_tests=bytes(32)).standard(100_001))
    torch.testing.assert_close(made[0], made[1], rtol=1e-12, atol=0)
    assert 0.98 < float(made[0].std()) < 1.02
