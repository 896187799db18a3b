"""Randomness by (seed, round, client): what a client draws does not depend on who computes it, or on who else is asked.

Counter-based (Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3": Philox): the seed is the
key, round and client are the counter's upper words. It is fast and can be foreseen: for the order of batches, never
for privacy. Poisson samples and noise come from `fedclaw.privacy.noise.GaussianSource`, under a key that the operating
system draws; or, where a researcher asks for noise that can be repeated, under one made from the seed, which guarantees
nothing to anybody.
"""

import hashlib

import numpy as np

from fedclaw.privacy.noise import GaussianSource

_KEY = 0x66656463_6C617721
# Any constant: it keeps these streams apart from others that are made from the same seed.


def generator_of(seed: int, round: int, client: int) -> np.random.Generator:
    """The stream of one client in one round."""
    return np.random.Generator(np.random.Philox(key=[seed, _KEY], counter=[0, 0, client, round]))


def noise_of(seed: int | None, round: int, client: int) -> GaussianSource:
    """The source of one client's Poisson samples and noise; `seed` None: cryptographic, never the same twice."""
    if seed is None:
        return GaussianSource()
    key = hashlib.sha256(f"simulated noise, not private|{seed}|{round}|{client}".encode()).digest()
    return GaussianSource(insecure_fixed_key_for_tests=key)
