"""How a site answers a request to train: policy, reservation, one round of local steps, the update and its receipt."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from flwr.app import ConfigRecord, MessageType, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedclaw.errors import PrivacyError
from fedclaw.learning.postprocess import SiteContext, at_site, template
from fedclaw.learning.step_loop import ModelSteps, distilled, make_optimizer, take_steps
from fedclaw.learning.strategy import PERSONAL
from fedclaw.privacy.distributed import Integers
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.mechanism import Mechanism
from fedclaw.privacy.provenance import Part, Permitted, Raw, Released
from fedclaw.privacy.steps import PlainGradients, PrivateGradients, StepTaker, shuffled_batches
from fedclaw.privacy.units import Units
from fedclaw.protocol.arrays import Arrays, Update, flattened, pack_leaving
from fedclaw.protocol.messages import ARRAYS, EXAMPLES, JSON, METRICS, RECEIPT, SUM, TEACHER, WEIGHT
from fedclaw.protocol.records import hash_of
from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.protocol.terms import Plan, SecureAggregation
from fedclaw.site.device import precision, set_threads
from fedclaw.site.pipeline import PlanAnswer, ReplyRecords
from fedclaw.site.policy.checks import check_plan
from fedclaw.site.privacy_budget import Due, charge_for, check_affordable, log_spending, receipt_of
from fedclaw.site.site import Site, is_prepared, prepare, sent_arrays
from fedclaw.site.strategy_client import ClientHalf, check_terms

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(inputs, outputs, targets) -> mean loss."""


@dataclass
class TrainingAnswer(PlanAnswer[Update, Update]):
    """A round of local steps; what leaves is the weighted delta, and what a strategy makes of it."""

    kind: ClassVar[str] = MessageType.TRAIN

    @cached_property
    def _mechanism(self) -> Mechanism:
        return mechanism_of(self.asked)

    @cached_property
    def _integers(self) -> Integers:
        return self._mechanism.integers(self.site.data.train.units)

    @property
    def _count(self) -> int:
        """Local steps of the round."""
        return self.asked.training.local_steps(self.site.examples)

    def check_session(self, secure: SecureAggregation) -> None:
        """See Answering."""
        check_plan(self.site.policy, self.asked, examples=self.site.examples, parameters=secure.length)
        check_terms(self.site, self.asked)
        self._mechanism.integers()
        charge = charge_for(self.site.policy, self.site.examples, self._mechanism)
        check_affordable(self.site, Due.training(self.site, self.asking, charge.mechanism))

    @contextmanager
    def ready(self) -> Iterator[Due]:
        """See Answering."""
        due = self.prepare()
        with self._steps:
            yield due

    def prepare(self) -> Due:
        """See Answering."""
        site, plan = self.site, self.asked
        sent = sent_arrays(self.content, ARRAYS)
        if plan.secure is not None:
            self._check_session(plan.secure, sent)
        size = sum(array.size for array in sent.values())
        check_plan(site.policy, plan, examples=self.site.examples, parameters=size)
        self._check_preprocessing()
        self._half = ClientHalf.open(site, plan, self.content, sent)
        self._start = self._half.own(sent)
        self._model = site.model(plan.model, self._start)
        set_threads(size)
        self._charge = charge_for(site.policy, self.site.examples, self._mechanism)
        due = Due.training(site, self.asking, self._charge.mechanism)
        # New constants take all data to be read, so every reason to refuse comes first.
        if not is_prepared(site, plan.preprocessing):
            check_affordable(site, due)
            prepare(site, plan.preprocessing)
        self._loss = _loss_of(site, plan, self.content)
        self._steps = self._step_taker()
        return due

    def answer(self, charge: str) -> Part[Update]:
        """Train, and have ready what is kept of it."""
        half, mechanism = self._half, self._mechanism
        correction = half.correction(self._model, self._count)
        with precision(self.site.device, sum(p.numel() for p in self._model.parameters()), mechanism.is_sampled):
            take_steps(
                self._batches(),
                self._model_steps(self._steps, self._model),
                None if mechanism.takes_one_step else correction,
            )
        delta = mechanism.outcome(self._delta(), self.site.examples)
        if not half.begins_released:
            # Steps that begin with what no noise covers tell of it, whatever bounds or covers them.
            delta = Raw(delta.value)
        finished = half.client_update(delta, self._count, self._training_loss)
        personal = self._personal(delta)
        whole = finished.scaled(1.0, lambda made: Update({**made.delta, **made.extras}, 1.0, self.site.examples))
        try:
            left = at_site(whole, self.asked, SiteContext(self.site.source, half.before))
        except PrivacyError as error:
            raise Refusal(RefusalCode.STRATEGY, f"strategy {self.asked.strategy!r}: {error}") from error
        self._left = left.value
        further = left.scaled(1.0, lambda update: update.state)
        half.remember(finished.then(lambda made: made.state), personal, further, charge)
        return left

    def let_out(self, contribution: Part[Update]) -> Released[Update] | Permitted[Update]:
        """See Answering."""
        return self._mechanism.let_out(contribution, self._charge)

    def encode(self, contribution: Part[Update]) -> Released[NDArray[np.uint32]] | Permitted[NDArray[np.uint32]]:
        """See Answering."""
        vector = contribution.scaled(1.0, lambda update: flattened(update.arrays))
        if not self._integers.hides_others(vector.value):
            raise Refusal(
                RefusalCode.SECURE_AGGREGATION,
                "what came of the training could not hide the other sites' updates in a sum (it diverged, or changed "
                "nothing); this site adds nothing to it",
            )
        return self._mechanism.encode(vector, self._integers, self._charge, self.site.source)

    def pack(self, left: Update) -> ReplyRecords:
        """See Answering. Rounded once, after all that a site does to it."""
        leaving = {
            name: array.astype(np.float32) if array.dtype == np.float64 else array
            for name, array in left.leaving.items()
        }
        return {SUM: pack_leaving(leaving)}

    def beside(self) -> ReplyRecords:
        """See Answering."""
        receipt = receipt_of(self.site, self.asking, self._mechanism, self._charge)
        log_spending(self.asking, receipt)
        return {
            METRICS: MetricRecord({WEIGHT: self._left.weight, EXAMPLES: self._left.examples}),
            RECEIPT: ConfigRecord({JSON: receipt.model_dump_json()}),
        }

    def _check_session(self, secure: SecureAggregation, sent: Arrays) -> None:
        """All sites begin with the same, and what comes of it fits the sum: checked before anything is paid for."""
        try:
            self._integers  # noqa: B018
        except PrivacyError as error:
            raise Refusal(RefusalCode.SECURE_AGGREGATION, str(error)) from error
        if secure.largest_weight is not None and self.asked.weight(self.site.examples) > secure.largest_weight:
            # The range of values was set for weights up to it; beyond, the update would be cut off unseen.
            raise Refusal(
                RefusalCode.SECURE_AGGREGATION,
                f"the secure sum is made for weights of at most {secure.largest_weight:g}, and this site has more "
                "examples",
            )
        if hash_of(self.content.array_records).hexdigest() != secure.content:
            raise Refusal(
                RefusalCode.SECURE_AGGREGATION, "the parameters are not those that the session's sites were told of"
            )
        length = sum(array.size for array in template(sent, self.asked).values())
        if length != secure.length:
            raise Refusal(
                RefusalCode.SECURE_AGGREGATION,
                f"an update has {length} numbers, and the sum is made for {secure.length}",
            )

    def _check_preprocessing(self) -> None:
        """Constants made from all training examples are outside of what epsilon covers: the operator has to know."""
        site = self.site
        covered = not site.workload.schema.data_dependent or site.policy.allow_data_dependent_preprocessing
        if self._mechanism.claims_privacy and not covered:
            raise Refusal(
                RefusalCode.PRIVACY_REQUIRED,
                "the schema standardises by the site's own statistics, which epsilon does not cover; agree on "
                "constants in the schema, or have the site's policy allow it",
            )

    def _step_taker(self) -> StepTaker:
        """The way of taking a step that the plan's mechanism has, before anything is paid for."""
        site, event = self.site, self._charge.mechanism
        try:
            return self._mechanism.step_taker(self._model, self._loss, site.examples, event, site.source, site.speed)
        except PrivacyError as error:
            raise Refusal(RefusalCode.MODEL, str(error)) from error

    def _batches(self) -> Iterator[torch.Tensor]:
        """The rows of each step."""
        site = self.site
        chosen = self._mechanism.batches(site.examples, site.data.train.units, self._charge.mechanism, site.source)
        return self._rows_of(chosen)

    def _rows_of(self, chosen: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Of batches of units, all rows that each unit has."""
        owners = self.site.data.train.persons
        if owners is None:
            return chosen
        persons = Units.of(owners)
        return (torch.from_numpy(persons.rows_of(np.sort(batch.numpy()))) for batch in chosen)

    def _model_steps(self, taker: StepTaker, model: torch.nn.Module) -> ModelSteps:
        """Steps of `model` on the site's training data by the local optimiser of the plan."""
        inputs, targets = self.site.on_device("train")
        train = self.site.data.train
        persons = None if train.persons is None else torch.from_numpy(train.persons)
        parameters: Sequence[torch.Tensor] = list(model.parameters())
        optimizer = make_optimizer(parameters, self.asked.training)

        def gradients(rows: torch.Tensor) -> None:
            taker.gradients(inputs[rows], targets[rows], None if persons is None else persons[rows])

        return ModelSteps(gradients, parameters, optimizer.step)

    def _delta(self) -> Arrays:
        """parameters - start, float32 by name; of one step whose noise is on the sum, the step, float64.

        As the difference of two sets of parameters it would be rounded to what they can hold, and as float32 to 2^-24
        of itself: one example could move it by more than its gradient was clipped to.
        """
        named = list(self._model.named_parameters())
        if not self._mechanism.takes_one_step:
            return {name: parameter.detach().cpu().numpy() - self._start[name] for name, parameter in named}
        names = [name for name, parameter in named if parameter.requires_grad]
        assert isinstance(self._steps, PrivateGradients)
        rate, exact = self.asked.training.learning_rate, self._steps.exact
        return {name: (gradient * -rate).cpu().numpy() for name, gradient in zip(names, exact, strict=True)}

    def _personal(self, delta: Part[Arrays]) -> Part[Arrays]:
        """The parameters that stay: as they were trained, or a whole model of the site's own, trained now.

        The latter takes its steps without noise, whatever the plan asks for: nothing of it leaves but the metrics that
        the site's policy permits.
        """
        site, plan, half = self.site, self.asked, self._half
        if not half.strategy.personal_model:
            trained = _copied(self._model, plan.personal)
            return delta.then(lambda _: trained)
        own = site.model(plan.model, {**self._start, **half.before.get(PERSONAL, {})}, role="personal")
        chosen = shuffled_batches(site.data.train.units, plan.training.batch_size, self._count, site.source)
        take_steps(
            self._rows_of(chosen),
            self._model_steps(PlainGradients(own, self._loss), own),
            half.personal_correction(own, self._start, self._count),
        )
        return Raw(_copied(own, self._start))

    def _training_loss(self) -> float:
        """The mean loss over the training data of the parameters that the round began with."""
        model = self.site.model(self.asked.model, self._start, role="start").eval()
        inputs, targets = self.site.on_device("train")
        with torch.no_grad():
            return float(self._loss(inputs, model(inputs), targets))


def _copied(model: torch.nn.Module, names: Collection[str]) -> Arrays:
    parameters = model.named_parameters()
    return {name: parameter.detach().cpu().numpy().copy() for name, parameter in parameters if name in names}


def _loss_of(site: Site, plan: Plan, content: RecordDict) -> Loss:
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
