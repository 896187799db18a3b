"""Trains a unit of clients: many at once or one at a time, with the strategy's client half and the postprocessors.

Randomness is by (seed, round, client): what a client draws does not depend on who computes it, or on who else is asked.
It is counter-based (Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3": Philox): the seed
is the key, round and client are the counter's upper words. It is fast and can be foreseen: for the order of batches,
never for privacy. Poisson samples and noise come from `fedclaw.privacy.noise.GaussianSource`, under a key that the
operating system draws; or, where a researcher asks for noise that can be repeated, under one made from the seed, which
guarantees nothing to anybody.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedclaw.learning.postprocess import SiteContext, at_site
from fedclaw.learning.registry import strategy_class
from fedclaw.learning.stacked.engines import BatchedModel, Engine, Loss, PlainModel
from fedclaw.learning.stacked.layout import Packing, Rows, pack, shuffled
from fedclaw.learning.stacked.private import ClientSampling, PrivateStep
from fedclaw.learning.stacked.steps import ClientSteps, RowSteps, plain_steps
from fedclaw.learning.step_loop import Correction as StepCorrection
from fedclaw.learning.step_loop import distillation_loss, take_steps
from fedclaw.learning.strategy import PERSONAL, RoundContext, Strategy, as_arrays, client_update_of, is_overridden
from fedclaw.learning.workload import load_parameters
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.steps import PrivateGradients
from fedclaw.protocol.arrays import Arrays, Update, flat
from fedclaw.protocol.terms import ModelSpec, Plan
from fedclaw.simulation.choice import CPU, Choice, make_engine
from fedclaw.simulation.correction import Correct, Correction
from fedclaw.simulation.federation import SimulatedFederation
from fedclaw.simulation.job import Answer, Round, State, size_of

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


@dataclass(frozen=True)
class Prepared:
    """What all units of a round share."""

    round: Round
    strategy: type[Strategy]
    engine: Engine
    start: torch.Tensor
    """(D,) the round's parameters."""


class Trainer:
    """One process's. What it computes depends on the round, the unit and the seed alone."""

    def __init__(
        self,
        federation: SimulatedFederation,
        choice: Choice,
        seed: int,
        *,
        repeatable_noise: bool,
        device: torch.device = CPU,
    ) -> None:
        self._federation = federation
        self._device = device
        self._choice = choice
        self._memory: Mapping[int, State] = {}
        self._seed = seed
        self._repeatable = repeatable_noise
        self._inputs = torch.from_numpy(federation.table.inputs).to(device)
        self._targets = torch.from_numpy(federation.table.targets).to(device)
        persons = federation.table.persons
        self._persons = None if persons is None else torch.from_numpy(persons)
        self._engines: dict[str, Engine] = {}
        self._private: dict[Engine, PrivateStep] = {}
        self._loss: Loss = lambda _inputs, outputs, _targets: outputs.sum()
        self._source: GaussianSource | None = None
        self._rows = torch.zeros(2, 0, 0)
        self._prepared: Prepared | None = None

    def answer(self, round: Round, unit: Sequence[int], memory: Mapping[int, State]) -> Answer:
        """Train the clients of `unit`, whose first has the most steps and which remember `memory`."""
        self._memory = memory
        prepared = self._prepare(round)
        answer = Answer(np.zeros((len(unit) if round.single else 1, size_of(round.template)), np.float32))
        plain, total = self._is_plain_sum(prepared), torch.zeros_like(prepared.start)
        for group in [list(unit)] if self._choice.many else [[client] for client in unit]:
            steps, counts = self._train(prepared, group)
            if plain:
                weights = [round.plan.weight(self._federation.examples(client)) for client in group]
                total.add_(steps.change(total.new_tensor(weights), prepared.start))
                answer.clients += group
                answer.weights += weights
                answer.payloads += [answer.numbers.shape[1] * answer.numbers.itemsize] * len(group)
            else:
                self._add(prepared, group, steps.rows(), counts, answer)
        if plain:
            answer.numbers[0] = flat(prepared.engine.layout.arrays(total), round.template)
        return answer

    def _prepare(self, round: Round) -> Prepared:
        if self._prepared is not None and self._prepared.round is round:
            return self._prepared
        plan = round.plan
        engine = self._engine(plan.model)
        self._loss = make_loss(self._federation, plan, round.teacher, self._device)
        if mechanism_of(plan).is_sampled and self._choice.many and engine not in self._private:
            assert isinstance(engine, BatchedModel)
            self._private[engine] = PrivateStep(engine)
        start = engine.layout.row(dict(round.parameters))
        self._prepared = Prepared(round, strategy_class(plan.strategy), engine, start)
        return self._prepared

    def _engine(self, spec: ModelSpec) -> Engine:
        key = spec.model_dump_json()
        if key not in self._engines:
            with torch.random.fork_rng(devices=[]):
                self._engines[key] = make_engine(
                    self._choice.kind,
                    lambda: self._federation.workload.build(spec).to(self._device),
                    lambda inputs, outputs, targets: self._loss(inputs, outputs, targets),
                )
        return self._engines[key]

    def _state(self, client: int) -> State:
        return self._memory.get(client, {})

    def _bound(self, engine: Engine, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (count, size) for parameters and gradients that `engine` works on.

        They are the first of as many as were ever needed: fresh memory is slow, and an engine need not be bound anew.
        """
        if self._rows.shape[1] < count or self._rows.shape[2] != size:
            self._rows = torch.zeros(2, count, size, device=self._device)
        engine.bind(self._rows[0], self._rows[1])
        return self._rows[0, :count], self._rows[1, :count]

    def _train(self, prepared: Prepared, group: Sequence[int]) -> tuple[ClientSteps, list[int]]:
        """The steps that the clients have taken, all of them, and how many each has."""
        plan, engine = prepared.round.plan, prepared.engine
        stack, gradients = self._bound(engine, len(group), len(prepared.start))
        samplings = self._samplings(prepared.round, group) if mechanism_of(plan).is_sampled else []
        batches = self._batches(plan, group, samplings)
        packings = pack(batches, self._choice.spare, self._device)
        correct: Correction | None = None
        # Nothing may change a gradient whose noise, on the sum, is still to come.
        if is_overridden(prepared.strategy, "correct_gradients") and not mechanism_of(plan).takes_one_step:
            correct = self._correction(
                prepared, prepared.strategy.correct_gradients, group, len(packings), alone=not self._choice.many
            )
        if not isinstance(engine, BatchedModel):
            torch.manual_seed(int(generator_of(self._seed, plan.round, group[0]).integers(2**63)))
        alike = not (samplings or plan.personal)
        if not alike:
            stack.copy_(prepared.start.expand_as(stack))
            self._put_personal(prepared, group, stack)
        if samplings:
            steps: ClientSteps = self._private_steps(prepared, samplings, packings, stack, gradients, correct)
        else:
            start = prepared.start if alike else None
            steps = self._plain_steps(prepared, packings, start, stack, gradients, correct)
        if mechanism_of(plan).takes_one_step:
            # The one plain step from its gradient: as a difference of parameters it would be rounded to those.
            stack.copy_(prepared.start.expand_as(stack)).add_(gradients, alpha=-plan.training.learning_rate)
        return steps, [len(own) for own in batches]

    def _correction(
        self, prepared: Prepared, correct: Correct, group: Sequence[int], steps: int, *, alone: bool
    ) -> Correction:
        states = [self._state(client) for client in group]
        kinds, layout = prepared.strategy.client_state, prepared.engine.layout
        return Correction.of(correct, kinds, prepared.round, layout, states, steps=steps, alone=alone)

    def _samplings(self, round: Round, group: Sequence[int]) -> list[ClientSampling]:
        samplings, plan = [], round.plan
        for client in group:
            examples = self._federation.examples(client)
            if self._repeatable:
                source = noise_of(self._seed, plan.round, client)
            else:
                source = self._source = self._source or GaussianSource()
            samplings.append(ClientSampling.of(plan, round.mechanisms[examples], examples, source))
        return samplings

    def _batches(self, plan: Plan, group: Sequence[int], samplings: Sequence[ClientSampling]) -> list[list[Rows]]:
        units = [self._federation.units(client) for client in group]
        if samplings:
            chosen = [
                sampling.batches(own, plan.training.local_steps(len(own)))
                for sampling, own in zip(samplings, units, strict=True)
            ]
        else:
            chosen = [
                shuffled(own, plan.training, generator_of(self._seed, plan.round, client))
                for client, own in zip(group, units, strict=True)
            ]
        return [self._rows_of(client, batches) for client, batches in zip(group, chosen, strict=True)]

    def _rows_of(self, client: int, batches: Sequence[Rows]) -> list[Rows]:
        """The rows of batches of a client's units."""
        return [self._federation.rows_of(client, batch) for batch in batches]

    def _plain_steps(
        self,
        prepared: Prepared,
        packings: Sequence[Packing],
        start: torch.Tensor | None,
        stack: torch.Tensor,
        gradients: torch.Tensor,
        correct: StepCorrection | None,
    ) -> ClientSteps:
        """All steps of a stack without privacy; `start` as in `plain_steps`."""
        engine, training = prepared.engine, prepared.round.plan.training
        corrected = correct is not None
        steps = plain_steps(engine, training, start, stack, gradients, packings, self._examples, corrected=corrected)
        take_steps(packings, steps, correct)
        return steps

    def _private_steps(
        self,
        prepared: Prepared,
        samplings: Sequence[ClientSampling],
        packings: Sequence[Packing],
        stack: torch.Tensor,
        gradients: torch.Tensor,
        correct: StepCorrection | None,
    ) -> RowSteps:
        """The same with differential privacy: many clients at once, or one by the code that a site has."""
        with self._private_gradients(prepared, samplings, gradients, len(packings)) as write:
            steps = RowSteps(write, prepared.round.plan.training, stack, gradients)
            take_steps(packings, steps, correct)
        return steps

    @contextmanager
    def _private_gradients(
        self, prepared: Prepared, samplings: Sequence[ClientSampling], gradients: torch.Tensor, steps: int
    ) -> Iterator[Callable[[Packing], None]]:
        """What leaves the noised gradients of a step in `gradients` (K, D)."""
        engine = prepared.engine
        if private := self._private.get(engine):
            yield lambda packing: private.gradients(
                packing, *self._examples(packing), gradients, samplings, self._owners(packing)
            )
            return
        (sampling,) = samplings
        assert isinstance(engine, PlainModel)
        with PrivateGradients(
            engine.model,
            self._loss,
            max_grad_norm=sampling.bound,
            noise_multiplier=sampling.noise,
            expected_batch_size=sampling.expected,
            source=sampling.source,
            steps_ahead=steps,
        ) as taker:
            views = [view[0] for view in engine.layout.views(gradients)]

            def write(packing: Packing) -> None:
                taker.gradients(*self._examples(packing), self._owners(packing))
                for view, parameter in zip(views, engine.model.parameters(), strict=True):
                    if parameter.requires_grad:
                        assert parameter.grad is not None
                        view.copy_(parameter.grad)
                    else:
                        view.zero_()

            yield write

    def _examples(self, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
        return self._inputs.index_select(0, packing.rows), self._targets.index_select(0, packing.rows)

    def _owners(self, packing: Packing) -> torch.Tensor | None:
        """(N,): whose each row of a step is, where persons are known."""
        return None if self._persons is None else self._persons[packing.rows.cpu()]

    def _put_personal(self, prepared: Prepared, group: Sequence[int], stack: torch.Tensor) -> None:
        """What clients have kept of parameters that never leave them, in the place of those that were sent."""
        if not prepared.round.plan.personal:
            return
        layout = prepared.engine.layout
        views = {place.name: view for place, view in zip(layout.places, layout.views(stack), strict=True)}
        for number, client in enumerate(group):
            for name, array in self._state(client).get(PERSONAL, {}).items():
                views[name][number].copy_(torch.from_numpy(array))

    def _add(
        self, prepared: Prepared, group: Sequence[int], stack: torch.Tensor, steps: Sequence[int], answer: Answer
    ) -> None:
        """The clients' updates to the answer, and what they remember to their memory."""
        round = prepared.round
        for client, row, count in zip(group, stack, steps, strict=True):
            update, state = self._update(prepared, client, row, count)
            if state:
                answer.memory[client] = state
            numbers = flat(update.arrays, round.template)
            if round.single:
                answer.numbers[len(answer.clients)] = numbers
            else:
                answer.numbers[0] += numbers
            answer.clients.append(client)
            answer.weights.append(update.weight)
            answer.payloads.append(update.payload)

    def _is_plain_sum(self, prepared: Prepared) -> bool:
        """Whether nothing happens to an update but that it is weighted and added."""
        round, strategy = prepared.round, prepared.strategy
        quiet = not (is_overridden(strategy, "client_update") or strategy.client_state or strategy.personal_model)
        weighted_alone = round.plan.compression is None and not mechanism_of(round.plan).clips_updates
        return quiet and weighted_alone and not round.single and not round.plan.personal

    def _update(self, prepared: Prepared, client: int, row: torch.Tensor, steps: int) -> tuple[Update, State]:
        """What leaves one client, whose parameters have become `row` (D,), and what it remembers."""
        round, strategy, plan = prepared.round, prepared.strategy, prepared.round.plan
        trained = prepared.engine.layout.arrays(row)
        own = self._state(client).get(PERSONAL, {}) if plan.personal else {}
        delta = {
            name: array - own.get(name, round.parameters[name])
            for name, array in trained.items()
            if name not in plan.personal
        }
        state = {kind: as_arrays(self._state(client), kind, delta) for kind in strategy.client_state}
        context = RoundContext(
            plan.strategy_fields,
            plan.training,
            steps,
            lambda: self._training_loss(prepared, client),
            {kind: dict(arrays) for kind, arrays in round.broadcast.items()},
            state,
        )
        examples, mechanism = self._federation.examples(client), mechanism_of(plan)
        made = mechanism.outcome(delta, examples)
        finished = client_update_of(strategy, made, context, released=mechanism.noises_steps)
        personal = {name: trained[name] for name in plan.personal}
        if strategy.personal_model:
            personal = self._own_model(prepared, client)
        repeatable = self._repeatable or not mechanism.is_sampled
        source = noise_of(self._seed if repeatable else None, plan.round, -1 - client)
        whole = finished.scaled(1.0, lambda own: Update({**own.delta, **own.extras}, 1.0, examples))
        update = at_site(whole, plan, SiteContext(source, self._state(client))).value
        state = {**finished.value.state, **update.state, **({PERSONAL: personal} if personal else {})}
        return update, {kind: dict(arrays) for kind, arrays in state.items()}

    def _own_model(self, prepared: Prepared, client: int) -> Arrays:
        """A whole model of the client's own, trained now, without noise: nothing of it leaves."""
        round, engine = prepared.round, prepared.engine
        own = self._state(client).get(PERSONAL, {})
        row = engine.layout.row({**round.parameters, **own})[None].clone()
        gradients = torch.zeros_like(row)
        engine.bind(row, gradients)
        generator = generator_of(self._seed, round.plan.round, client + len(self._federation))
        batches = shuffled(self._federation.units(client), round.plan.training, generator)
        packings = pack([self._rows_of(client, batches)], device=self._device)
        correct = self._correction(
            prepared, prepared.strategy.correct_personal_gradients, [client], len(packings), alone=True
        )
        self._plain_steps(prepared, packings, None, row, gradients, correct)
        return engine.layout.arrays(row[0])

    def _training_loss(self, prepared: Prepared, client: int) -> float:
        """The mean loss over a client's training data of the parameters that the round began with."""
        own = self._state(client).get(PERSONAL, {}) if prepared.round.plan.personal else {}
        parameters = {**prepared.round.parameters, **own}
        model = loaded_model(self._federation, prepared.round.plan.model, parameters, self._device)
        rows = torch.from_numpy(self._federation.share(client)).to(self._device)
        inputs, targets = self._inputs[rows], self._targets[rows]
        with torch.no_grad():
            return float(self._loss(inputs, model.eval()(inputs), targets))


def make_loss(
    federation: SimulatedFederation,
    plan: Plan,
    teacher: Mapping[str, NDArray[np.float32]] | None,
    device: torch.device = CPU,
) -> Loss:
    """The loss that `plan` asks for, of outputs on `device`."""
    if plan.distillation is None:
        return lambda _inputs, outputs, targets: federation.workload.loss(outputs, targets)
    wanted = plan.distillation
    teaching = loaded_model(federation, wanted.teacher, teacher or {}, device).eval().requires_grad_(False)

    def loss(inputs: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            soft = teaching(inputs)
        own = federation.workload.loss(outputs, targets)
        return distillation_loss(outputs, soft, own, wanted.temperature, wanted.weight, federation.workload.task)

    return loss


def loaded_model(
    federation: SimulatedFederation,
    spec: ModelSpec,
    parameters: Mapping[str, NDArray[np.float32]],
    device: torch.device = CPU,
) -> nn.Module:
    """A model with these parameters, on `device`."""
    with torch.random.fork_rng(devices=[]):
        model = federation.workload.build(spec).to(device)
    load_parameters(model, parameters)
    return model
