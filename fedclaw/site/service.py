"""How a site answers: by its policy first, then by training or evaluating on its own data.

The site decides (the policy bounds what leaves, whatever the server asks), pays before it trains (the ledger
holds a reservation before the first gradient), and writes down what leaves (the outbound log).
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from pydantic import ValidationError

from fedclaw.compress.distil import distillation_loss
from fedclaw.errors import BudgetExceeded, FedClawError, LedgerError, PluginError, PrivacyError
from fedclaw.federation import postprocess
from fedclaw.federation.arrays import Arrays, pack, unpack
from fedclaw.federation.exchange import ARRAYS, EXAMPLES, JSON, METRICS, PLAN, RECEIPT, SUM, TEACHER, WEIGHT
from fedclaw.federation.plan import PLAN_VERSION, ModelSpec, Plan, Receipt, Refusal, RefusalCode
from fedclaw.federation.postprocess import Update
from fedclaw.federation.registry import strategy_class
from fedclaw.federation.strategy import Strategy
from fedclaw.frozen import explain
from fedclaw.privacy.accounting import Mechanism, calibrate
from fedclaw.privacy.ledger import Budget, Ledger
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.policy import Policy, check_plan, check_request, check_size, permitted_metrics
from fedclaw.privacy.steps import PlainGradients, PrivateGradients, StepTaker, poisson_batches, shuffled_batches
from fedclaw.site.device import precision, set_threads
from fedclaw.site.outbound import OutboundLog
from fedclaw.site.training import make_optimizer, train
from fedclaw.workload import Table, Workload

log = logging.getLogger(__name__)

EVALUATION_BATCH = 4096

ABOUT, RUN = "about", "run"
"""The record of a reply that says what it belongs to: after a restart it is all that the site has of the question."""

WARM_MODELS = 3
"""Models kept between messages: a student, its teacher, and one that is evaluated beside them."""

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(inputs, outputs, targets) -> mean loss."""


@dataclass(frozen=True)
class SiteData:
    """A site's tables and the fingerprint (SHA-256) of the training data's content."""

    train: Table
    test: Table | None
    fingerprint: str


@dataclass
class SiteService:
    """One site, warm: data, models and calibrated noise stay in memory between messages.

    Implements `fedclaw.runtime.base.SiteHandler`.
    """

    name: str
    federation: str
    workload: Workload
    schema_digest: str
    data: SiteData
    policy: Policy
    ledger: Ledger
    outbound: OutboundLog | None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    source: GaussianSource = field(default_factory=GaussianSource)
    _models: OrderedDict[str, torch.nn.Module] = field(default_factory=OrderedDict, init=False, repr=False)
    """Warm models, the least recently used one first."""
    _tensors: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, init=False, repr=False)

    def answer(self, message: Message) -> Message:
        """Train or evaluate as asked, or refuse with a reason; never raises for a bad request."""
        try:
            return Message(self._answer(message), reply_to=message)
        except Refusal as refusal:
            detail = str(refusal.__cause__ or "")
            log.warning("refused: %s%s", refusal.reason, "" if detail in refusal.reason else f" ({detail})")
            return _error(refusal, message)
        except Exception:
            log.exception("the task failed")
            return _error(
                Refusal(RefusalCode.FAILED, "the site failed at this task; its operator finds why in its log"), message
            )

    def release(self, message: Message, reply: Message, size: int, digest: str) -> None:
        """Settle what the reply cost, and log that it leaves."""
        receipt = None
        if reply.has_content() and RECEIPT in reply.content.config_records:
            self.ledger.settle(message.metadata.message_id)
            receipt = str(reply.content.config_records[RECEIPT][JSON])
        if self.outbound is not None:
            self.outbound.append(
                federation=self.federation,
                run=_run_name(message, reply),
                round=message.metadata.group_id,
                kind=message.metadata.message_type,
                message_id=message.metadata.message_id,
                size=size,
                digest=digest,
                receipt=receipt,
            )

    def _answer(self, message: Message) -> RecordDict:
        plan = _plan_of(message)
        self._check(plan)
        kind = message.metadata.message_type
        if kind == MessageType.TRAIN:
            answer = self._train(plan, message.content, message.metadata.message_id)
        elif kind == MessageType.EVALUATE:
            answer = self._evaluate(plan, message.content)
        else:
            raise Refusal(RefusalCode.MALFORMED, f"messages of type {kind!r} are not answered here")
        answer[ABOUT] = ConfigRecord({RUN: plan.run})
        return answer

    def _check(self, plan: Plan) -> None:
        if plan.version != PLAN_VERSION:
            raise Refusal(
                RefusalCode.MALFORMED, f"plan version {plan.version} is asked for; this site speaks {PLAN_VERSION}"
            )
        if plan.federation != self.federation:
            raise Refusal(
                RefusalCode.FEDERATION, f"this site is of federation {self.federation!r}, not {plan.federation!r}"
            )
        if plan.workload != self.workload.name:
            raise Refusal(
                RefusalCode.WORKLOAD,
                f"workload {plan.workload!r} is asked for; this site holds {self.workload.name!r} data",
            )
        if plan.schema_digest != self.schema_digest:
            raise Refusal(RefusalCode.SCHEMA, "the server's schema is not this site's: compare the two schema files")
        check_request(self.policy, plan)

    def _train(self, plan: Plan, content: RecordDict, key: str) -> RecordDict:
        start = _arrays(content, ARRAYS)
        size, examples = sum(array.size for array in start.values()), len(self.data.train)
        check_plan(self.policy, plan, examples=examples, parameters=size)
        self._check_preprocessing(plan)
        model = self._model(plan.model, start)
        strategy = _strategy(plan)
        set_threads(size)
        mechanism = self._mechanism(plan, examples)
        with self._steps(plan, mechanism, model, self._loss(plan, content)) as steps:
            self._reserve(plan, mechanism, key)
            self._run_steps(plan, mechanism, steps, model, strategy)
        update = postprocess.at_site(Update(_delta(model, start), 1.0, examples), plan)
        receipt = self._receipt(plan, mechanism)
        _log_spending(plan, receipt)
        return RecordDict(
            {
                SUM: pack(update.arrays),
                METRICS: MetricRecord({WEIGHT: update.weight, EXAMPLES: update.examples}),
                RECEIPT: ConfigRecord({JSON: receipt.model_dump_json()}),
            }
        )

    def _check_preprocessing(self, plan: Plan) -> None:
        """Constants made from all training examples are outside of what epsilon covers: the operator has to know."""
        covered = not self.workload.schema.data_dependent or self.policy.allow_data_dependent_preprocessing
        if plan.privacy is not None and not covered:
            raise Refusal(
                RefusalCode.PRIVACY_REQUIRED,
                "the schema standardises by the site's own statistics, which epsilon does not cover; agree on "
                "constants in the schema, or have the site's policy allow it",
            )

    def _steps(self, plan: Plan, mechanism: Mechanism | None, model: torch.nn.Module, loss: Loss) -> StepTaker:
        """The way of taking a step that the plan asks for, before anything is paid for."""
        if mechanism is None or plan.privacy is None:
            return PlainGradients(model, loss)
        try:
            return PrivateGradients(
                model,
                loss,
                max_grad_norm=plan.privacy.max_grad_norm,
                noise_multiplier=mechanism.noise_multiplier,
                expected_batch_size=mechanism.sample_rate * len(self.data.train),
                source=self.source,
            )
        except PrivacyError as error:
            raise Refusal(RefusalCode.MODEL, str(error)) from error

    def _run_steps(
        self,
        plan: Plan,
        mechanism: Mechanism | None,
        steps: StepTaker,
        model: torch.nn.Module,
        strategy: type[Strategy],
    ) -> None:
        """Train `model`, which holds the global parameters, for one round of `plan`."""
        examples = len(self.data.train)
        count = plan.training.local_steps(examples)
        parameters = list(model.parameters())
        start = [parameter.detach().clone() for parameter in parameters]
        if mechanism is None:
            batches = shuffled_batches(examples, plan.training.batch_size, count, self.source)
        else:
            batches = poisson_batches(examples, mechanism.sample_rate, count, self.source)
        inputs, targets = self._on_device("train", self.data.train)
        train(
            steps,
            batches,
            inputs,
            targets,
            make_optimizer(parameters, plan.training),
            parameters,
            correction=lambda changed: strategy.correct(plan.strategy_fields, changed, start),
            precision=precision(self.device, sum(p.numel() for p in parameters), mechanism is not None),
        )

    def _evaluate(self, plan: Plan, content: RecordDict) -> RecordDict:
        if self.data.test is None:
            raise Refusal(RefusalCode.METRICS, "this site holds no test data, so it does not evaluate")
        wanted = permitted_metrics(self.policy, plan.metrics, len(self.data.test))
        model = self._model(plan.model, _arrays(content, ARRAYS)).eval()
        inputs, targets = self._on_device("test", self.data.test)
        with torch.no_grad():
            logits = torch.cat([model(part) for part in torch.split(inputs, EVALUATION_BATCH)])
        values = self.workload.evaluate(logits, targets)
        weight = float(len(self.data.test))
        sums = {name: values[name] * weight for name in wanted if name in values}
        return RecordDict({METRICS: MetricRecord({WEIGHT: weight, EXAMPLES: len(self.data.test), **sums})})

    def _model(self, spec: ModelSpec, parameters: Arrays, role: str = "student") -> torch.nn.Module:
        """A warm model of `spec` with these parameters in it; takes no more memory than what arrived did."""
        check_size(self.policy, sum(array.size for array in parameters.values()))
        key = f"{role} {spec.model_dump_json()}"
        warm = self._models.get(key)
        try:
            with torch.device("meta"):
                shell = self.workload.build(spec) if warm is None else warm
            expected = {name: tuple(parameter.shape) for name, parameter in shell.named_parameters()}
            if expected != {name: array.shape for name, array in parameters.items()}:
                raise Refusal(RefusalCode.MODEL, f"the parameters sent are not those of model {spec.name!r}")
            while warm is None and len(self._models) >= WARM_MODELS:
                self._models.popitem(last=False)
            model = self.workload.build(spec).to(self.device) if warm is None else warm
        except PluginError as error:
            raise Refusal(RefusalCode.MODEL, str(error)) from error
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(np.array(parameters[name])))
        self._models[key] = model
        self._models.move_to_end(key)
        return model

    def _loss(self, plan: Plan, content: RecordDict) -> Loss:
        if plan.distillation is None:
            return lambda _inputs, outputs, targets: self.workload.loss(outputs, targets)
        wanted = plan.distillation
        teacher = self._model(wanted.teacher, _arrays(content, TEACHER), role="teacher").eval().requires_grad_(False)

        def loss(inputs: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                soft = teacher(inputs)
            return distillation_loss(
                outputs, soft, self.workload.loss(outputs, targets), wanted.temperature, wanted.weight
            )

        return loss

    def _mechanism(self, plan: Plan, examples: int) -> Mechanism | None:
        """One round's mechanism: noise calibrated so that all rounds of the run together spend the epsilon asked."""
        if plan.privacy is None:
            return None
        rate = min(1.0, plan.training.batch_size / examples)
        steps = plan.training.local_steps(examples)
        try:
            noise = calibrate(plan.privacy.epsilon, plan.privacy.delta, rate, steps * plan.rounds)
        except PrivacyError as error:
            raise Refusal(
                RefusalCode.EPSILON,
                f"no noise keeps what was asked for within epsilon {plan.privacy.epsilon:g} at delta "
                f"{plan.privacy.delta:g}; ask for fewer rounds or steps, smaller batches or a larger epsilon",
            ) from error
        return Mechanism(sample_rate=rate, noise_multiplier=noise, steps=steps)

    def _reserve(self, plan: Plan, mechanism: Mechanism | None, key: str) -> None:
        try:
            self.ledger.reserve(
                key,
                federation=plan.federation,
                run=plan.run,
                round=plan.round,
                mechanism=mechanism,
                budget=Budget(epsilon=self.policy.epsilon, delta=self.policy.delta),
                run_budget=Budget(epsilon=self.policy.epsilon_per_run, delta=self.policy.delta),
            )
        except BudgetExceeded as error:
            # The ledger's figures (steps, sample rate, what is spent) tell how many examples there are: for the log.
            raise Refusal(
                RefusalCode.BUDGET,
                "privacy budget: what is left of it at this site, for its data set or for this run, is not enough for "
                "the round",
            ) from error
        except LedgerError as error:
            log.error("%s", error)
            raise Refusal(RefusalCode.FAILED, "the site's privacy ledger cannot be used; it does not train") from error

    def _receipt(self, plan: Plan, mechanism: Mechanism | None) -> Receipt:
        delta = plan.privacy.delta if plan.privacy else self.policy.delta
        run = self.ledger.spent(delta, run=plan.run, federation=plan.federation)
        lifetime = self.ledger.spent(self.policy.delta)
        budget = self.policy.epsilon
        bounded = budget is not None and np.isfinite(lifetime)
        return Receipt(
            mechanism="dp-sgd" if mechanism else "none",
            sampler="poisson" if mechanism else "shuffle",
            accountant="pld" if mechanism else "none",
            sample_rate=mechanism.sample_rate
            if mechanism
            else min(1.0, plan.training.batch_size / len(self.data.train)),
            steps=plan.training.local_steps(len(self.data.train)),
            noise_multiplier=mechanism.noise_multiplier if mechanism else 0.0,
            max_grad_norm=plan.privacy.max_grad_norm if plan.privacy else 0.0,
            delta=delta,
            rounds=self.ledger.rounds(plan.run, plan.federation),
            epsilon_run=run if np.isfinite(run) else None,
            epsilon_lifetime=lifetime if np.isfinite(lifetime) else None,
            epsilon_left=max(0.0, budget - lifetime) if bounded and budget is not None else None,
            ledger_head=self.ledger.head(),
        )

    def _on_device(self, split: str, table: Table) -> tuple[torch.Tensor, torch.Tensor]:
        if split not in self._tensors:
            inputs, targets = torch.from_numpy(table.inputs), torch.from_numpy(table.targets)
            self._tensors[split] = inputs.to(self.device), targets.to(self.device)
        return self._tensors[split]


def _delta(model: torch.nn.Module, start: Arrays) -> Arrays:
    """parameters - start, float32 by name."""
    return {name: parameter.detach().cpu().numpy() - start[name] for name, parameter in model.named_parameters()}


def _log_spending(plan: Plan, receipt: Receipt) -> None:
    run, lifetime = (
        "unbounded" if value is None else f"{value:.3f}" for value in (receipt.epsilon_run, receipt.epsilon_lifetime)
    )
    left = "no limit set" if receipt.epsilon_left is None else f"{receipt.epsilon_left:.3f} left"
    log.info(
        "run %s, round %d of %d: trained %d steps; epsilon %s by this run, %s in all, %s",
        *(plan.run, plan.round, plan.rounds, receipt.steps, run, lifetime, left),
    )


def _plan_of(message: Message) -> Plan:
    try:
        return Plan.model_validate_json(str(message.content.config_records[PLAN][JSON]))
    except (KeyError, ValueError) as error:
        reason = explain(error) if isinstance(error, ValidationError) else f"the message lacks {error}"
        raise Refusal(RefusalCode.MALFORMED, f"the plan cannot be read: {reason}") from error


def _run_name(message: Message, reply: Message) -> str:
    """The run that `reply` belongs to. After a restart, `message` has no content, and an error never has any."""
    if reply.has_content() and ABOUT in reply.content.config_records:
        return str(reply.content.config_records[ABOUT][RUN])
    try:
        return _plan_of(message).run
    except Refusal:
        return f"number {message.metadata.run_id}"


def _arrays(content: RecordDict, name: str) -> Arrays:
    try:
        return unpack(content.array_records[name])
    except (KeyError, FedClawError) as error:
        raise Refusal(RefusalCode.MALFORMED, f"the record {name!r} cannot be read: {error}") from error


def _strategy(plan: Plan) -> type[Strategy]:
    """The plan's strategy, after it has looked at its fields: before anything is paid for."""
    try:
        strategy = strategy_class(plan.strategy)
        strategy.correct(plan.strategy_fields, [], [])
    except PluginError as error:
        raise Refusal(RefusalCode.STRATEGY, str(error)) from error
    except (KeyError, ValueError) as error:
        raise Refusal(RefusalCode.STRATEGY, f"the fields of strategy {plan.strategy!r} are wrong: {error}") from error
    return strategy


def _error(refusal: Refusal, message: Message) -> Message:
    return Message(Error(code=refusal.code, reason=refusal.reason), reply_to=message)
