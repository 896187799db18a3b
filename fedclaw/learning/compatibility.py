"""Combinations of settings that cannot be right: asked by the server of a run, and by each site of every question.

`refusal` is the one rule for both. It looks at class facts of the strategy, at the model's names and shapes, and at
`Terms`: what a run's record and a round's plan both say. So a site does not rest on a check of the server's, and needs
to know no strategy by name: what a strategy uses of the data beyond clipped and noised gradients, it declares.

What may leave under which noise, and why:

    none, privacy=dp      whatever the strategy makes of parameters and of what it kept: under local noise all of it
                          follows from noised steps. Not the training loss, which no step has noised
    secure sum, no noise  what all sites begin alike with; nothing that each brings itself (`_unhidden`)
    central, unit site    the update, clipped as a whole: whatever a site kept, or trained besides, its part is within
                          the bound. No extras (the server's half would take the noise for them), no second model
    central, unit example the one clipped step as it is. Nothing that a strategy makes of it, no extras, and nothing
                          that stays at the site: what was trained without noise would be where the next round begins,
                          and one example would move every gradient of that round, sampled in it or not
"""

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fedclaw.errors import PluginError
from fedclaw.learning.registry import strategy_class
from fedclaw.learning.strategy import Buffered, Strategy, is_overridden
from fedclaw.protocol.compression import RandomK, TopK
from fedclaw.protocol.frozen import check_settings
from fedclaw.protocol.plan import Plan, Terms
from fedclaw.protocol.update import is_extra

if TYPE_CHECKING:
    import torch


def refusal(terms: Terms, strategy: Strategy, model: "torch.nn.Module") -> str | None:
    """Why `terms` cannot be right with `strategy` and `model`, as a sentence's end; None: they can.

    Of `model` names and shapes count, so it may lie on torch's device "meta". Raises PluginError for a strategy that
    contradicts itself.
    """
    return _excluded(terms, strategy, model) or strategy.refuse(terms, model)


def early_refusal(terms: Terms, strategy: Strategy) -> str | None:
    """`refusal` as far as it can be told before there is a model, and so before torch is loaded."""
    for ask in (_excluded, lambda terms, strategy, model: strategy.refuse(terms, model)):
        try:
            reason: str | None = ask(terms, strategy, cast("torch.nn.Module", _NotBuilt()))
        except _ModelNeeded:
            continue
        if reason:
            return reason
    return None


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


def _excluded(terms: Terms, strategy: Strategy, model: "torch.nn.Module") -> str | None:
    """What follows from how a strategy works, whichever it is."""
    if strategy.needs_single_updates and terms.secure is not None:
        return "has to see every update by itself, which secure aggregation hides; take another strategy or secure=none"
    if terms.secure is not None and (reason := _unhidden(terms, strategy, model)):
        return reason
    if reason := _uncompressed(terms, strategy):
        return reason
    if isinstance(strategy, Buffered) and (reason := _unbuffered(terms)):
        return reason
    extras = strategy.extras(_zeros(model))
    if odd := [name for name in extras if not is_extra(name)]:
        raise PluginError(f"strategy {strategy.name!r} adds {odd[0]!r} to updates, whose name has to begin with '~'")
    if terms.central is not None and (reason := _unsummed(strategy, extras=bool(extras))):
        return reason
    if terms.central is not None and terms.central.unit == "example" and (reason := _unstepped(strategy, model)):
        return reason
    if strategy.uses_training_loss and (terms.privacy is not None or terms.central is not None):
        return "works out what leaves from the loss on the training data, which no noise covers; take privacy=none"
    return None


def _unhidden(terms: Terms, strategy: Strategy, model: "torch.nn.Module") -> str | None:
    """What a secure sum does not hide where each site's part is not noised, by itself or by all of them.

    A sum hides its parts only if none is known beforehand. All sites begin with the same parameters (they sign a digest
    of them), so a server cannot have some of them send nothing, except through parameters that each brings itself: a
    head that was spoilt in an earlier round, of other sites, stops every gradient below it.
    """
    noised = terms.privacy is not None or (terms.central is not None and terms.central.noise_by == "sites")
    if not noised and strategy.personal(model):
        return (
            "keeps parameters at each site, of which secure aggregation cannot see that all sites begin alike: without "
            "noise at the sites a sum could be one site's update; take privacy=dp, or a strategy that shares all"
        )
    return None


def _unsummed(strategy: Strategy, *, extras: bool) -> str | None:
    """What noise on the sum does not go with."""
    if strategy.needs_single_updates:
        return "takes no mean of the updates, and noise on the sum is made for a mean; take privacy=dp, at the sites"
    if extras:
        return "sends more than updates, and noise on the sum is made for updates alone; take privacy=dp, at the sites"
    if strategy.personal_model:
        return (
            "trains a second model at each site, which noise on the sum does not cover; take privacy=dp, at the sites"
        )
    return None


def _unstepped(strategy: Strategy, model: "torch.nn.Module") -> str | None:
    """What does not go with one clipped step a round whose noise is on the sum."""
    if strategy.personal(model):
        return (
            "keeps parameters at each site, which central.unit=example, one step a round with the noise on the sum, "
            "trains without noise, and the next round begins with them; take central.unit=site or privacy=dp"
        )
    if strategy.client_state or is_overridden(type(strategy), "client_update"):
        return (
            "makes more of a site's step than the step, and central.unit=example bounds each example's part in the "
            "step alone; take central.unit=site or privacy=dp"
        )
    return None


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


def _unbuffered(terms: Terms) -> str | None:
    """What needs all of a round's sites to begin with the same parameters."""
    if terms.secure is not None:
        return "adds answers to different questions, and a secure sum is over answers to one; take secure=none"
    if terms.central is not None:
        return "discounts late answers, and noise on the sum is made for a plain mean; take privacy=dp, at the sites"
    return None


def _zeros(model: "torch.nn.Module") -> "dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]":
    """Zeros of the names and shapes of the model's parameters, which take no memory."""
    return {
        name: np.broadcast_to(np.float32(0), tuple(parameter.shape)) for name, parameter in model.named_parameters()
    }
