"""Renyi divergences of sampled Gaussian and discrete Gaussian mechanisms, and the epsilon that follows from them.

Renyi accounting is looser than privacy loss distributions, but it needs no more than bounds on the divergence. Sums of
discrete Gaussians have such bounds (concentrated differential privacy) and no exact distribution in many dimensions,
so it is what they are accounted by; and it is the way out where a distribution's grid gives no answer.

A curve is an array (K,): upper bounds on the divergences of ORDERS between neighbouring data sets, which differ in one
unit (an example, a site) being there or not, in both directions.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.float64]

_INTEGERS: Curve = np.unique(np.concatenate([np.arange(2.0, 25.0), np.geomspace(25, 1024, 24).round()]))
# Orders at which sampled mechanisms are computed; their work grows with the order.
ORDERS: Curve = np.unique(np.concatenate([1.0 + np.geomspace(0.02, 1e6, 150), _INTEGERS]))
"""The orders alpha of a curve. Neighbours of alpha - 1 differ by an eighth: the best of them costs at most 0.2% more
epsilon than the best of all."""


@lru_cache(maxsize=1024)
def sampled_curve(rate: float, rho: float) -> Curve:
    """One release of noise added to a Poisson sample with probability `rate`; rho-concentrated when all take part.

    Valid for noise that is symmetric about zero and whose divergence of order alpha, without sampling, is at most
    alpha rho: Gaussian noise and any sum of discrete Gaussians, reduced to a modulus or not.

    P, Q: the outputs with and without the unit; S = (1 - rate) Q + rate P. At integer orders the binomial theorem
    gives D(S || Q) from the divergences of P from Q. D(Q || S) is never larger, as the reflection that swaps P and Q
    is a symmetry of the noise (Mironov, Talwar, Zhang 2019, "Renyi Differential Privacy of the Sampled Gaussian
    Mechanism", theorem 5; it asks no more of the noise than this). The general bound of Zhu and Wang 2019 ("Poisson
    Subsampled Renyi Differential Privacy", theorem 5) does without the symmetry, at several times the epsilon.
    """
    if rate == 1:
        return ORDERS * rho
    return _at_orders(np.array([_sampled(rate, rho, int(order)) for order in _INTEGERS]), rho)


def epsilon_from(curve: Curve, delta: float) -> float:
    """Epsilon at `delta` (Canonne, Kamath, Steinke 2020, proposition 12, by dp_accounting)."""
    from dp_accounting.rdp import compute_epsilon

    epsilon, _ = compute_epsilon(ORDERS.tolist(), curve.tolist(), delta)
    return float(epsilon)


def _at_orders(at_integers: Curve, rho: float) -> Curve:
    """A sampled mechanism's curve, from its divergences at `_INTEGERS` and the rho of the mechanism without sampling.

    (alpha - 1) x divergence is convex in alpha and zero at 1 (van Erven and Harremoes 2014, corollary 2), so a
    straight line between two orders bounds it. Sampling never adds divergence (quasi-convexity, theorem 13 there), so
    that alpha rho bounds every order, those above the largest integer too.
    """
    products = np.interp(ORDERS, [1.0, *_INTEGERS], [0.0, *((_INTEGERS - 1) * at_integers)], right=np.inf)
    curve: Curve = np.minimum(products / (ORDERS - 1), ORDERS * rho)
    return curve


def _sampled(rate: float, rho: float, order: int) -> float:
    """log(sum over l of b(l) exp(l (l - 1) rho)) / (order - 1), b the binomial probabilities of `order` and `rate`.

    Written as log(1 + sum of b(l) (exp(...) - 1)), as the b(l) sum to 1: all terms are positive, none cancels.
    """
    terms = np.arange(2, order + 1, dtype=np.float64)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, order + 1)))])
    binomial = log_factorial[order] - log_factorial[2:] - log_factorial[order - 2 :: -1]
    binomial += terms * math.log(rate) + (order - terms) * math.log1p(-rate)
    growth = terms * (terms - 1) * rho
    excess = growth + np.log(-np.expm1(-growth))
    return float(np.logaddexp(0.0, np.logaddexp.reduce(binomial + excess))) / (order - 1)
