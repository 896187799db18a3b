"""Keys stay where they are, a larger share holds the smaller ones, and the salt decides."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from fedclaw.serve.routing.keys import KeyHash
from tests.chance import TINY, counts_fit, uncorrelated

SALT = "00112233445566778899aabbccddeeff"
KEYS = [f"patient-{number:06d}" for number in range(20_000)]


def test_shares_are_nested_and_of_the_right_size():
    hashed = KeyHash("m", SALT)
    taking_part = [{key for key in KEYS if hashed.share(key) < share} for share in (0.05, 0.1, 0.25, 0.5, 1.0)]
    for smaller, larger in pairwise(taking_part):
        assert smaller < larger
    assert len(taking_part[-1]) == len(KEYS)
    assert counts_fit([len(taking_part[0])], len(KEYS), 0.05)
    assert counts_fit([len(taking_part[3])], len(KEYS), 0.5)


def test_keys_spread_evenly_and_what_is_mirrored_does_not_depend_on_the_version():
    positions = [KeyHash("m", SALT).position(key) for key in KEYS]
    shares, mirrors = [one.share for one in positions], [one.mirror for one in positions]
    assert kstest(shares, "uniform").pvalue > TINY
    assert kstest(mirrors, "uniform").pvalue > TINY
    assert uncorrelated(shares, mirrors)
    assert len({one.unit for one in positions}) == len(KEYS)


def test_another_model_or_salt_tries_other_keys():
    first, model, salt = KeyHash("m", SALT), KeyHash("n", SALT), KeyHash("m", SALT[::-1])
    for other in (model, salt):
        assert uncorrelated([first.share(key) for key in KEYS], [other.share(key) for key in KEYS])


def test_another_process_finds_a_key_at_the_same_place():
    program = (
        f"from fedclaw.serve.routing.keys import KeyHash; print(repr(KeyHash('m', '{SALT}').position('é\\ud800')))"
    )
    answered = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answered.stdout.strip() == repr(KeyHash("m", SALT).position("é\ud800"))


@given(st.text(st.characters(), max_size=40))
def test_every_text_is_a_key(key: str):
    hashed = KeyHash("m", SALT)
    position = hashed.position(key)
    assert 0 <= position.share < 1
    assert 0 <= position.mirror < 1
    assert position.share == hashed.share(key) == KeyHash("m", SALT).share(key)
    assert np.float64(position.share) == position.share
