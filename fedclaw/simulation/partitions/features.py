"""Clients that differ in their inputs: by what their instruments do, or by the values that they see."""

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from fedclaw.errors import Setting, UsageError
from fedclaw.simulation.partitions.base import Hand, Indices, PartitionMethod
from fedclaw.simulation.partitions.transforms import Brightness, Noise, Rotation, Transform

Kind = Literal["noise", "brightness", "rotation", "quantile"]

_USUAL: dict[Kind, float] = {"noise": 0.1, "brightness": 0.5, "rotation": 45.0, "quantile": 1.0}
_MOST: dict[Kind, float] = {"noise": 100.0, "brightness": 1.0, "rotation": 180.0, "quantile": 1.0}


class FeatureShift(PartitionMethod):
    """Each client sees other inputs: its own noise, brightness or angle, or a range of a feature's values.

    The kinds of feature skew of Li, Diao, Chen, He 2022, "Federated learning on non-IID data silos", section 3:
    noise-based (client i of K, counted from 1, adds Gaussian noise of the variance strength x i / K), and two
    transformations of images that stand for unlike scanners. In these, rows are dealt as by `iid` and labels are
    left alone. `quantile` changes no input: the rows, sorted by one feature, are cut in K runs, as sites
    differ that see other ages.
    """

    name: Literal["feature_shift"] = "feature_shift"
    kind: Kind = "noise"
    strength: float | None = Field(default=None, gt=0)
    """noise: the last client's variance, in units of a table column's variance, or with pixels in [0, 1].
    brightness: factors go from 1 - strength to 1 + strength. rotation: angles from -strength to strength degrees.
    quantile: the share of rows that is dealt by the feature, not at random. null: 0.1, 0.5, 45, 1."""
    feature: int = Field(default=0, ge=0)
    """quantile: the feature's number, from 0, among the numbers of one input."""

    @model_validator(mode="after")
    def _within(self) -> Self:
        if self.strength is not None and self.strength > _MOST[self.kind]:
            raise ValueError(f"strength {self.strength:g} is too large for {self.kind}: at most {_MOST[self.kind]:g}")
        return self

    def assign(self, hand: Hand) -> tuple[Sequence[Indices], Transform | None]:
        """Even shares, and what each client's instruments do."""
        if self.kind == "quantile":
            return hand.even(self._by_feature(hand)), None
        shares = hand.even(hand.generator.permutation(len(hand.targets)))
        return shares, self._transform(hand)

    def _shown(self) -> dict[str, Any]:
        shown = super()._shown() | {"strength": self._strength}
        if self.kind != "quantile":
            del shown["feature"]
        return shown

    @property
    def _strength(self) -> float:
        return _USUAL[self.kind] if self.strength is None else self.strength

    def _by_feature(self, hand: Hand) -> Indices:
        """The rows by the feature's value, equals in random order, those not dealt by it exchanged at random."""
        values = hand.inputs.reshape(len(hand.targets), -1)
        if self.feature >= values.shape[1]:
            raise UsageError(
                Setting("partition.feature"),
                f": there is no feature {self.feature}; an input has {values.shape[1]} numbers, counted from 0",
            )
        order = hand.generator.permutation(len(values))
        order = order[np.argsort(values[order, self.feature], kind="stable")]
        places = np.flatnonzero(hand.generator.random(len(order)) >= self._strength)
        order[places] = order[hand.generator.permutation(places)]
        return order

    def _transform(self, hand: Hand) -> Transform:
        images = hand.inputs.ndim > 2
        if self.kind != "noise" and not images:
            raise UsageError(Setting("partition.kind"), f": {self.kind} is for images; a table has noise and quantile")
        bounds = (float(hand.inputs.min()), float(hand.inputs.max())) if images else (-np.inf, np.inf)
        steps = np.linspace(-1.0, 1.0, hand.clients) if hand.clients > 1 else np.zeros(1)
        if self.kind == "brightness":
            return Brightness(1 + self._strength * steps, bounds)
        if self.kind == "rotation":
            return Rotation(self._strength * steps, bounds)
        scale: NDArray[np.float64] = np.array(bounds[1] - bounds[0]) if images else hand.inputs.std(axis=0)
        levels = self._strength * np.arange(1, hand.clients + 1) / hand.clients
        return Noise(levels, scale, bounds if images else None, int(hand.generator.integers(2**63)))
