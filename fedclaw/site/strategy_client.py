"""The client half of a strategy, for one round at one site: its contexts, and what the site remembers for it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from flwr.app import RecordDict

from fedclaw.errors import PluginError, PrivacyError, UsageError
from fedclaw.learning.compatibility import refusal, strategy_of
from fedclaw.learning.postprocess import KINDS as FEEDBACK
from fedclaw.learning.step_loop import Correction
from fedclaw.learning.strategy import (
    PERSONAL,
    ClientUpdate,
    RoundContext,
    StepContext,
    Strategy,
    as_arrays,
    client_update_of,
    is_overridden,
)
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.provenance import Clause, Part, Permitted, Released, leaving
from fedclaw.protocol.arrays import Arrays
from fedclaw.protocol.messages import BROADCAST
from fedclaw.protocol.questions import by_kind
from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.protocol.terms import Plan
from fedclaw.site.policy.policy import listed
from fedclaw.site.site import Site, sent_arrays
from fedclaw.site.state import Provenance, State


@dataclass(frozen=True)
class ClientHalf:
    """What one round of `plan` at `site` needs of the plan's strategy. Made by `open`; raises nothing afterwards."""

    site: Site
    plan: Plan
    strategy: type[Strategy]
    broadcast: Mapping[str, Arrays]
    before: State
    """What the site begins the round with."""
    before_made: Provenance | None
    """What that was made under; None: there is nothing, or it was kept by a version that did not note it."""
    made: Provenance
    """What this round makes is made under."""

    @classmethod
    def open(cls, site: Site, plan: Plan, content: RecordDict, parameters: Arrays) -> "ClientHalf":
        """Raises Refusal, before anything is paid for, for a strategy, fields or combination that cannot be right.

        `parameters` are those in `content`.
        """
        strategy, sent = check_terms(site, plan), _sent(content)
        _check_sent(strategy, sent, parameters, plan)
        made = Provenance(
            **mechanism_of(plan).origin.model_dump(),
            strategy=plan.strategy,
            own_model=strategy.personal_model,
            model=plan.model,
            personal=tuple(sorted(plan.personal)),
            compression=plan.compression,
            weighting=plan.weighting,
            weight_cap=plan.weight_cap,
        )
        return cls(site, plan, strategy, sent, *_begin(site, plan, made), made)

    def own(self, parameters: Arrays) -> Arrays:
        """`parameters` as they were sent, with the site's own in the place of those that never leave it."""
        mine = self.before.get(PERSONAL, {})
        return {
            name: mine.get(name, array) if name in self.plan.personal else array for name, array in parameters.items()
        }

    def correction(self, model: torch.nn.Module, steps: int) -> Correction | None:
        """The strategy's, if it has one, for `steps` local steps of `model`, which holds what the round begins with."""
        if not is_overridden(self.strategy, "correct_gradients"):
            return None
        start = [parameter.detach().clone() for parameter in model.parameters()]
        return self._corrected(self.strategy.correct_gradients, model, start, steps)

    def personal_correction(self, model: torch.nn.Module, start: Arrays, steps: int) -> Correction:
        """The same for the site's own model, beside the global parameters `start`."""
        device = self.site.device
        origin = [torch.tensor(start[name], device=device) for name, _ in model.named_parameters()]
        return self._corrected(self.strategy.correct_personal_gradients, model, origin, steps)

    @property
    def begins_released(self) -> bool:
        """Whether all that steps and corrections take of what the site kept follows from noised steps alone."""
        taken = [kind for kind in self.before if kind != PERSONAL or self.plan.personal]
        return all(self.before_made is not None and self.before_made.covers(kind) for kind in taken)

    def client_update(self, delta: Part[Arrays], steps: int, loss: Callable[[], float]) -> Part[ClientUpdate]:
        """What leaves of `delta`, by parameter name, and what the site remembers."""
        plan, stays = self.plan, self.plan.personal
        shared = delta.scaled(1.0, lambda arrays: {n: a for n, a in arrays.items() if n not in stays})
        state = {kind: as_arrays(self.before, kind, shared.value) for kind in self.strategy.client_state}
        context = RoundContext(plan.strategy_fields, plan.training, steps, loss, self.broadcast, state)
        return client_update_of(self.strategy, shared, context, released=self.begins_released)

    def remember(self, own: Part[State], personal: Part[Arrays], further: Part[State], charge: str) -> None:
        """Have the strategy's `own` state, the parameters of `personal`, and `further` state ready for what comes.

        They are kept when the answer that was charged as `charge` is about to leave (`SiteStates.commit`). Raises
        PrivacyError for what is raw where `Provenance` would call it covered.
        """
        kept = personal.then(lambda arrays: {PERSONAL: arrays} if arrays else {})
        state: dict[str, Arrays] = {}
        for part in (own, kept, further):
            if not isinstance(part, Released) and any(self.made.covers(kind) for kind in part.value):
                raise PrivacyError(f"{', '.join(part.value)} would be kept as released, and no noise covers that")
            state |= part.value
        plan = self.plan
        self.site.states.stage(plan.federation, plan.run, plan.round, state, charge, self.made, self.before)

    def _corrected(
        self,
        correct: Callable[[Sequence[torch.Tensor], StepContext], None],
        model: torch.nn.Module,
        start: Sequence[torch.Tensor],
        steps: int,
    ) -> Correction:
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

        def aligned(arrays: Arrays) -> list[torch.Tensor]:
            """In the parameters' order; zeros for one that `arrays` lacks."""
            return [
                torch.tensor(arrays[name], device=self.site.device) if name in arrays else torch.zeros_like(parameter)
                for name, parameter in parameters.items()
            ]

        sent = {kind: aligned(arrays) for kind, arrays in self.broadcast.items()}
        state = {kind: aligned(self.before.get(kind, {})) for kind in self.strategy.client_state}
        personal = [name in self.plan.personal for name in parameters]
        fields, rate = self.plan.strategy_fields, self.plan.training.learning_rate

        def apply(parameters: Sequence[torch.Tensor], step: int) -> None:
            correct(parameters, StepContext(fields, start, sent, state, step, steps, rate, personal))

        return apply


def _begin(site: Site, plan: Plan, made: Provenance) -> tuple[State, Provenance | None]:
    """What the site begins a round under `made` with, and what that says it was made under.

    Raises Refusal if that is anything else.

    A memory of compression alone says itself what it belongs to, and begins anew.
    """
    found = site.states.find(plan.federation, plan.run)
    if found is None or plan.round <= 1:
        return {}, None
    if found.made == made or (found.made is None and not mechanism_of(plan).claims_privacy):
        return found.beginning(plan.round), found.made
    if found.after.keys() <= FEEDBACK:
        return {}, None
    raise Refusal(RefusalCode.STRATEGY, _mixed(plan, found.made, made))


def _mixed(plan: Plan, found: Provenance | None, asked: Provenance | None) -> str:
    remedy = "a run keeps to what it began with: begin another"
    if found is None:
        return (
            f"what this site keeps of run {plan.run!r} was kept by an earlier version, which did not note what noise "
            f"covers it, so no private round begins with it; {remedy}"
        )
    return f"what this site keeps of run {plan.run!r} was made under {found}; now it is asked under {asked}; {remedy}"


def personal_parameters(site: Site, plan: Plan, parameters: Arrays) -> Arrays:
    """The parameters that the site is evaluated with: those sent, with its own in the place of what it keeps.

    Raises Refusal.
    """
    strategy = _checked(plan, site.shell(plan.model))
    whole = strategy.personal_model
    found = site.states.find(plan.federation, plan.run) if whole or plan.personal else None
    mine = found.after.get(PERSONAL, {}) if found else {}
    if found is None or not mine:
        return parameters
    with_own = {
        name: own if (whole or name in plan.personal) and (own := mine.get(name, array)).shape == array.shape else array
        for name, array in parameters.items()
    }
    return _evaluated(site, plan, found.made, with_own)


def _evaluated(site: Site, plan: Plan, made: Provenance | None, parameters: Arrays) -> Arrays:
    """`parameters` with what this site keeps for its own, if metrics of them may leave. Raises Refusal.

    What a training example did to parameters that no noise covers, it does to their metrics, and noise on those is made
    for test examples.
    """
    if made is not None and (made.strategy, made.model, set(made.personal)) != (
        plan.strategy,
        plan.model,
        set(plan.personal),
    ):
        raise Refusal(
            RefusalCode.STRATEGY,
            f"what this site keeps of run {plan.run!r} was made under {made}, and is not to be evaluated as strategy "
            f"{plan.strategy!r}, model {plan.model.name!r}",
        )
    without = site.policy.allow_training_without_privacy
    clause: Clause = "allow_training_without_privacy" if without else "allow_metrics_of_own_models"
    covered = made is not None and made.covers(PERSONAL)
    try:
        return leaving(Released(parameters) if covered else Permitted(parameters, clause), site.policy)
    except PrivacyError as error:
        raise Refusal(
            RefusalCode.METRICS,
            "metrics of a model were asked for that is this site's own, at least in part, and was trained without "
            "noise; this site shares metrics of models that its privacy covers (allow_metrics_of_own_models)",
        ) from error


def check_terms(site: Site, plan: Plan) -> type[Strategy]:
    """The plan's strategy, if what `plan` asks to be trained can be right with it. Raises Refusal.

    A server asks the same of a run that it makes (`fedclaw.learning.compatibility`); here it is what a guarantee rests
    on, since nobody knows what a server has asked itself.
    """
    shell = site.shell(plan.model)
    strategy = _checked(plan, shell)
    if reason := refusal(plan, strategy, shell):
        raise Refusal(RefusalCode.STRATEGY, f"strategy {plan.strategy!r} {reason}")
    return type(strategy)


def _checked(plan: Plan, shell: torch.nn.Module) -> Strategy:
    """The plan's strategy, after it has looked at its fields and at what of `shell` is to stay here. Raises Refusal."""
    try:
        strategy = strategy_of(plan)
    except (PluginError, UsageError) as error:
        raise Refusal(RefusalCode.STRATEGY, str(error)) from error
    except (KeyError, ValueError) as error:
        raise Refusal(RefusalCode.STRATEGY, f"the fields of strategy {plan.strategy!r} are wrong: {error}") from error
    own = strategy.personal(shell)
    if own != frozenset(plan.personal):
        stays, called = listed(tuple(sorted(own)), "nothing"), listed(plan.personal, "nothing")
        raise Refusal(
            RefusalCode.STRATEGY,
            f"strategy {plan.strategy!r} leaves {stays} of model {plan.model.name!r} at the sites, and the plan calls "
            f"{called} personal",
        )
    return strategy


def _sent(content: RecordDict) -> dict[str, Arrays]:
    if BROADCAST not in content.array_records:
        return {}
    try:
        return by_kind(sent_arrays(content, BROADCAST))
    except ValueError as error:
        raise Refusal(RefusalCode.MALFORMED, f"the record {BROADCAST!r} cannot be read: {error}") from error


def _check_sent(strategy: type[Strategy], sent: Mapping[str, Arrays], parameters: Arrays, plan: Plan) -> None:
    """Raise Refusal unless there is an array for each parameter that is trained together, of each kind it needs."""
    expected = {name: array.shape for name, array in parameters.items() if name not in plan.personal}
    for kind in strategy.broadcast_kinds:
        if {name: array.shape for name, array in sent.get(kind, {}).items()} != expected:
            raise Refusal(
                RefusalCode.STRATEGY,
                f"strategy {plan.strategy!r} needs the server's {kind!r} for each parameter, and what came is not that",
            )
