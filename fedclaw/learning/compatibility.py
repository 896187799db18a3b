"""Combinations of settings that cannot be right: asked by the server of a run, and by each site of every question.

`refusal` is the one rule for both. It looks at class facts of the strategy, at the model's names and shapes, and at
`Terms`: what a run's record and a round's plan both say. So a site does not rest on a check of the server's, and needs
to know no strategy by name: what a strategy uses of the data beyond clipped and noised gradients, it declares.

What may leave under which noise is the mechanism's to say (`Mechanism.refuse`); here is only what it is asked about,
and what neither noise nor data has a part in.
"""

from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fedclaw.errors import PluginError, Reason, Setting
from fedclaw.learning.registry import strategy_class
from fedclaw.learning.strategy import Buffered, Strategy, is_overridden
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.mechanism import DataUse
from fedclaw.protocol.arrays import is_extra
from fedclaw.protocol.frozen import check_settings
from fedclaw.protocol.terms import Plan, RandomK, Terms, TopK

if TYPE_CHECKING:
    import torch


def data_use(strategy: Strategy, model: "torch.nn.Module | None") -> DataUse:
    """What `strategy` uses of the data with `model`; without a model, of what needs one: nothing.

    Raises PluginError for extras whose names are none.
    """
    extras = {} if model is None else strategy.extras(_zeros(model))
    if odd := [name for name in extras if not is_extra(name)]:
        raise PluginError(f"strategy {strategy.name!r} adds {odd[0]!r} to updates, whose name has to begin with '~'")
    return DataUse(
        needs_single_updates=strategy.needs_single_updates,
        uses_training_loss=strategy.uses_training_loss,
        trains_own_model=strategy.personal_model,
        changes_step=bool(strategy.client_state) or is_overridden(type(strategy), "client_update"),
        sends_extras=bool(extras),
        keeps_parameters=model is not None and bool(strategy.personal(model)),
    )


def refusal(terms: Terms, strategy: Strategy, model: "torch.nn.Module") -> str | None:
    """Why `terms` cannot be right with `strategy` and `model`, as a sentence's end; None: they can.

    Of `model` names and shapes count, so it may lie on torch's device "meta". Raises PluginError for a strategy that
    contradicts itself.
    """
    return _refusal(terms, strategy, data_use(strategy, model)) or strategy.refuse(terms, model)


def early_refusal(terms: Terms, strategy: Strategy) -> str | None:
    """`refusal` as far as it can be told before there is a model, and so before torch is loaded."""
    if reason := _refusal(terms, strategy, data_use(strategy, None)):
        return reason
    with suppress(_ModelNeeded):
        return strategy.refuse(terms, cast("torch.nn.Module", _NotBuilt()))
    return None


def _refusal(terms: Terms, strategy: Strategy, use: DataUse) -> str | None:
    return (
        _unbuffered(terms, strategy)
        or mechanism_of(terms).refuse(use)
        or _one_of_its_own(use)
        or _uncompressed(terms, strategy)
    )


class _ModelNeeded(Exception):
    """Only a model can say."""


class _NotBuilt:
    """Stands where a model would: whoever asks anything of it has to wait until there is one."""

    def __getattr__(self, name: str) -> Any:
        raise _ModelNeeded(name)


def strategy_of(plan: Plan) -> Strategy:
    """The strategy of `plan` with the settings that its client half will work with.

    A setting that the plan does not tell is what its field says, if one is called like it. Raises PluginError, KeyError
    or ValueError for a strategy or fields that will not do, ValueError for fields that do not follow from the settings
    (what is refused would be judged by others than those that are used), and UsageError for settings.
    """
    chosen = strategy_class(plan.strategy)
    chosen.check_fields(plan.strategy_fields)
    untold = {name: value for name, value in plan.strategy_fields.items() if name in chosen.model_fields}
    strategy = check_settings({**untold, **plan.strategy_settings}, chosen)
    if dict(strategy.client_fields()) != plan.strategy_fields:
        raise ValueError("they do not follow from the settings that were sent with them")
    return strategy


def _uncompressed(terms: Terms, strategy: Strategy) -> str | None:
    """What needs updates whose numbers can be compared, or added, one by one."""
    if strategy.needs_single_updates and isinstance(terms.compression, TopK):
        return (
            "compares updates number by number, and with compression=topk each site sends other numbers: most of what "
            "is compared are zeros; take another compression"
        )
    if isinstance(strategy, Buffered) and isinstance(terms.compression, RandomK):
        return "adds answers of several rounds, and compression=randk sends other positions in each; take another one"
    return None


def _one_of_its_own(use: DataUse) -> str | None:
    """What a site keeps for its own is either all of a model or some parameters of the one that is trained together.

    Were it both, the second model's parameters, which no noise covers, would take the place of the first one's.
    """
    if use.trains_own_model and use.keeps_parameters:
        return "trains a model of each site's own, and keeps parameters of the shared one there as well; it can do one"
    return None


def _unbuffered(terms: Terms, strategy: Strategy) -> str | None:
    """What needs all of a round's sites to begin with the same parameters."""
    if not isinstance(strategy, Buffered):
        return None
    if terms.secure is not None:
        return Reason(
            "adds answers to different questions, and a secure sum is over answers to one; take ",
            Setting("secure", "none"),
        )
    if terms.central is not None:
        return Reason(
            "discounts late answers, and noise on the sum is made for a plain mean; take ", Setting("privacy", "dp")
        )
    return None


def _zeros(model: "torch.nn.Module") -> "dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]":
    """Zeros of the names and shapes of the model's parameters, which take no memory."""
    return {
        name: np.broadcast_to(np.float32(0), tuple(parameter.shape)) for name, parameter in model.named_parameters()
    }
