"""How a site answers a request to train: policy, reservation, one round of local steps, the update and its receipt."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedclaw.errors import PrivacyError
from fedclaw.learning import postprocess
from fedclaw.learning.distillation import distilled
from fedclaw.learning.step_loop import Correction, ModelSteps, make_optimizer, take_steps
from fedclaw.learning.strategy import PERSONAL
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.mechanism import Charge
from fedclaw.privacy.postprocessor import SiteContext
from fedclaw.privacy.steps import PlainGradients, PrivateGradients, StepTaker, shuffled_batches
from fedclaw.protocol.arrays import Arrays, pack_wire
from fedclaw.protocol.messages import ABOUT, ARRAYS, CHARGE, EXAMPLES, JSON, METRICS, RECEIPT, SUM, TEACHER, WEIGHT
from fedclaw.protocol.plan import Plan, Receipt, Refusal, RefusalCode
from fedclaw.protocol.update import Update
from fedclaw.site.data import is_prepared, prepare
from fedclaw.site.device import precision, set_threads
from fedclaw.site.journal.ledger import Reservation
from fedclaw.site.policy.checks import check_plan
from fedclaw.site.privacy_budget import (
    Account,
    Asking,
    Due,
    charge_of,
    check_affordable,
    log_spending,
    receipt_of,
    reserve,
)
from fedclaw.site.site import Site, sent_arrays
from fedclaw.site.strategy_client import ClientHalf

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(inputs, outputs, targets) -> mean loss."""


@dataclass(frozen=True)
class LocalUpdate:
    """What a round of training left at the site: ready to leave, and paid for."""

    update: Update
    receipt: Receipt
    charge: str
    """The hash of its charge in the ledger."""


def answer_training(site: Site, plan: Plan, content: RecordDict, asking: Asking) -> RecordDict:
    """The weighted delta of one round, with its receipt. Raises Refusal before anything is paid for."""
    local = train_locally(site, plan, content, asking)
    # Rounded once, after all that a site does to it.
    leaving = {
        name: array.astype(np.float32) if array.dtype == np.float64 else array
        for name, array in local.update.leaving.items()
    }
    return RecordDict({SUM: pack_wire(leaving), **about(local)})


def about(local: LocalUpdate) -> dict[str, MetricRecord | ConfigRecord]:
    """The records that go with an update, in whatever form it leaves."""
    update = local.update
    return {
        METRICS: MetricRecord({WEIGHT: update.weight, EXAMPLES: update.examples}),
        RECEIPT: ConfigRecord({JSON: local.receipt.model_dump_json()}),
        ABOUT: ConfigRecord({CHARGE: local.charge}),
    }


@dataclass(frozen=True)
class Begun:
    """A round of training that nothing keeps from beginning: checked, ready, and paid for."""

    half: ClientHalf
    start: Arrays
    model: torch.nn.Module
    charge: Charge
    loss: Loss
    steps: StepTaker
    reservation: Reservation


@contextmanager
def begun(site: Site, plan: Plan, content: RecordDict, asking: Asking) -> Iterator[Begun]:
    """All that comes before the first step, the charge last. Raises Refusal before anything is paid for."""
    sent = sent_arrays(content, ARRAYS)
    size, examples = sum(array.size for array in sent.values()), len(site.data.train)
    check_plan(site.policy, plan, examples=examples, parameters=size)
    _check_preprocessing(site, plan)
    half = ClientHalf.open(site, plan, content)
    start = half.own(sent)
    model = site.model(plan.model, start)
    set_threads(size)
    charge = charge_of(site, plan)
    due = Due.of_plan(site, plan, asking, charge.mechanism, Account.training(site))
    _prepare(site, plan, due)
    loss = _loss(site, plan, content)
    with _steps(site, plan, charge, model, loss) as steps:
        yield Begun(half, start, model, charge, loss, steps, reserve(site, due))


def train_locally(site: Site, plan: Plan, content: RecordDict, asking: Asking) -> LocalUpdate:
    """Train as `plan` asks, under a reservation for `asking`. Raises Refusal before anything is paid for."""
    with begun(site, plan, content, asking) as ready:
        examples = len(site.data.train)
        half, start, model, charge = ready.half, ready.start, ready.model, ready.charge
        loss, steps = ready.loss, ready.steps
        count = plan.training.local_steps(examples)
        _run_steps(site, plan, charge, steps, model, half.correction(model, count))
    delta = (
        _step_taken(steps, model, plan)
        if isinstance(steps, PrivateGradients) and mechanism_of(plan).takes_one_step
        else _delta(model, start)
    )
    finished = half.client_update(delta, count, lambda: _training_loss(site, plan, start, loss))
    personal = _personal(site, plan, half, model, start, loss)
    whole = Update({**finished.delta, **finished.extras}, 1.0, examples)
    update = postprocess.at_site(whole, plan, SiteContext(site.source, half.before))
    half.remember(finished, personal, update.state, ready.reservation.hash)
    receipt = receipt_of(site, plan, charge)
    log_spending(plan, receipt)
    return LocalUpdate(update, receipt, ready.reservation.hash)


def _prepare(site: Site, plan: Plan, due: Due) -> None:
    """Standardise by the plan's constants. New ones take all data to be read, so every reason to refuse comes first."""
    if not is_prepared(site, plan.preprocessing):
        check_affordable(site, due)
        prepare(site, plan.preprocessing)


def _check_preprocessing(site: Site, plan: Plan) -> None:
    """Constants made from all training examples are outside of what epsilon covers: the operator has to know."""
    covered = not site.workload.schema.data_dependent or site.policy.allow_data_dependent_preprocessing
    if mechanism_of(plan).claims_privacy and not covered:
        raise Refusal(
            RefusalCode.PRIVACY_REQUIRED,
            "the schema standardises by the site's own statistics, which epsilon does not cover; agree on "
            "constants in the schema, or have the site's policy allow it",
        )


def _steps(site: Site, plan: Plan, charge: Charge, model: torch.nn.Module, loss: Loss) -> StepTaker:
    """The way of taking a step that the plan's mechanism has, before anything is paid for."""
    mechanism, examples = mechanism_of(plan), len(site.data.train)
    try:
        return mechanism.step_taker(model, loss, examples, charge.mechanism, site.source, site.speed)
    except PrivacyError as error:
        raise Refusal(RefusalCode.MODEL, str(error)) from error


def _run_steps(
    site: Site, plan: Plan, charge: Charge, steps: StepTaker, model: torch.nn.Module, correction: Correction
) -> None:
    """Train `model`, which holds what the round begins with, for one round of `plan`."""
    mechanism, parameters = mechanism_of(plan), list(model.parameters())
    with precision(site.device, sum(p.numel() for p in parameters), mechanism.is_sampled):
        take_steps(
            mechanism.batches(len(site.data.train), charge.mechanism, site.source),
            _model_steps(site, plan, steps, parameters),
            None if mechanism.takes_one_step else correction,
        )


def _model_steps(site: Site, plan: Plan, taker: StepTaker, parameters: Sequence[torch.Tensor]) -> ModelSteps:
    """Steps on the site's training data by the local optimiser of the plan."""
    inputs, targets = site.on_device("train", site.data.train)
    optimizer = make_optimizer(parameters, plan.training)
    return ModelSteps(lambda rows: taker.gradients(inputs[rows], targets[rows]), parameters, optimizer.step)


def _personal(site: Site, plan: Plan, half: ClientHalf, model: torch.nn.Module, start: Arrays, loss: Loss) -> Arrays:
    """The parameters that stay: of `model`, as it was trained, or a whole model of the site's own, trained now.

    The latter takes its steps without noise, whatever the plan asks for: nothing of it leaves but the metrics that the
    site's policy permits.
    """
    trained = {name: parameter.detach().cpu().numpy().copy() for name, parameter in model.named_parameters()}
    if not half.strategy.personal_model:
        return {name: trained[name] for name in plan.personal if name in trained}
    examples, count = len(site.data.train), plan.training.local_steps(len(site.data.train))
    own = site.model(plan.model, {**start, **half.before.get(PERSONAL, {})}, role="personal")
    take_steps(
        shuffled_batches(examples, plan.training.batch_size, count, site.source),
        _model_steps(site, plan, PlainGradients(own, loss), list(own.parameters())),
        half.personal_correction(own, start, count),
    )
    return {name: parameter.detach().cpu().numpy().copy() for name, parameter in own.named_parameters()}


def _training_loss(site: Site, plan: Plan, start: Arrays, loss: Loss) -> float:
    """The mean loss over the training data of the parameters that the round began with."""
    model = site.model(plan.model, start, role="start").eval()
    inputs, targets = site.on_device("train", site.data.train)
    with torch.no_grad():
        return float(loss(inputs, model(inputs), targets))


def _loss(site: Site, plan: Plan, content: RecordDict) -> Loss:
    if plan.distillation is None:
        return lambda _inputs, outputs, targets: site.workload.loss(outputs, targets)
    wanted = plan.distillation
    teacher = site.model(wanted.teacher, sent_arrays(content, TEACHER), role="teacher").eval().requires_grad_(False)

    def loss(inputs: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            soft = teacher(inputs)
        return distilled(
            outputs,
            soft,
            lambda own: site.workload.loss(own, targets),
            wanted.temperature,
            wanted.weight,
            site.workload.task,
        )

    return loss


def _delta(model: torch.nn.Module, start: Arrays) -> Arrays:
    """parameters - start, float32 by name."""
    return {name: parameter.detach().cpu().numpy() - start[name] for name, parameter in model.named_parameters()}


def _step_taken(steps: PrivateGradients, model: torch.nn.Module, plan: Plan) -> Arrays:
    """The one plain step, from its gradient, float64 by name.

    As the difference of two sets of parameters it would be rounded to what they can hold, and as float32 to 2^-24 of
    itself: one example could move it by more than its gradient was clipped to.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    rate = plan.training.learning_rate
    return {name: (exact * -rate).cpu().numpy() for name, exact in zip(names, steps.exact, strict=True)}
