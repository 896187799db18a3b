"""A simulated federation's data: whose rows are whose, and what the model is tested on.

Legend: N examples, D shape of one input, C classes, K clients.
"""

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import TypeAdapter, ValidationError

from fedclaw.api.arguments import argument, public, whole
from fedclaw.api.frames import FrameReader, as_list, is_frame, named
from fedclaw.catalogue import did_you_mean
from fedclaw.clients.array_schema import ArraySchema
from fedclaw.clients.arrays import (
    ClassReader,
    NumberReader,
    classes_of,
    inputs_of,
    labels_of,
    persons_of,
    require_pairs,
    rows_in_words,
)
from fedclaw.clients.persons import EXPECTED, USUAL_ROWS
from fedclaw.errors import DataError, UsageError
from fedclaw.learning.tasks.regression import NumberTarget, RegressionLoss
from fedclaw.learning.workload import Schema, Table
from fedclaw.protocol.frozen import explain
from fedclaw.simulation.partitions.base import Partition, PartitionMethod
from fedclaw.simulation.partitions.settings import PartitionSettings

TestAt = Literal["federation", "clients"]
Rows = NDArray[np.int64]
_PARTITIONS: TypeAdapter[PartitionMethod] = TypeAdapter(PartitionSettings)
_ARGUMENTS = (
    "clients",
    "partition",
    "by",
    "test",
    "test_at",
    "seed",
    "value_range",
    "loss",
    "persons",
    "person",
    "rows_per_person",
)
_NAMES = ("iid", "dirichlet", "shards", "quantity", "feature_shift")


class Federation:
    """Examples and who has them; made by `from_arrays`, `from_clients`, `from_frame` or `from_frames`.

    Nothing in it changes. Use it for as many runs as you like: `fedclaw.simulate(federation, MyNet, ...)`. `names` are
    the clients', and `columns` those of the inputs (D,), where the data had them.
    """

    def __init__(
        self,
        schema: Schema,
        table: Table,
        shares: Sequence[Rows],
        *,
        test: Table | None = None,
        tests: Sequence[Rows] | None = None,
        names: Sequence[str] | None = None,
        columns: Sequence[str] = (),
    ) -> None:
        """For those that make one; `fedclaw.simulation.SimulatedFederation` says what is what."""
        self.schema, self.table, self.test = schema, table, test
        self.shares, self.tests = tuple(shares), None if tests is None else tuple(tests)
        self.names, self.columns = None if names is None else tuple(names), tuple(columns)

    @classmethod
    @public
    def from_arrays(
        cls,
        x: ArrayLike,
        y: ArrayLike,
        *,
        clients: int | None = None,
        partition: str = "iid",
        by: ArrayLike | None = None,
        test: float | tuple[ArrayLike, ...] = 0.2,
        test_at: TestAt = "federation",
        seed: int = 0,
        value_range: tuple[float, float] | None = None,
        loss: RegressionLoss = "squared",
        persons: ArrayLike | None = None,
        rows_per_person: int | None = None,
        **options: Any,
    ) -> Self:
        """Deal examples `x` (N, *D) with targets `y` (N,) to clients.

        Targets are class labels; or, with `value_range`, numbers within it, which are predicted themselves by `loss`:
        squared, huber or poisson. The range is declared: what is known of such values, not what the data happens to be.

        `clients` and `partition` say how: iid, dirichlet (alpha=1.0), shards (shards=2), quantity (sizes differ) or
        feature_shift; what each takes, `options`, is in docs/partitions.md. Or `by` (N,) says which client each example
        is from, a hospital's name perhaps. `test` is held out: a share of the examples, or a pair of arrays; with
        test_at="clients" that share of each client's own, for strategies that leave each client a model of its own.
        `persons` (N,) says whose each example is, by text or whole numbers. A guarantee is then for each person, all of
        whose examples are dealt to one client and held out together (with `by` they stay where they are); `test` is
        (x, y, persons), of other people. Metrics use a person's first `rows_per_person` examples, 1 if not stated.

        The same seed gives the same federation. Raises DataError, UsageError.
        """
        inputs, reader = inputs_of(x), _reader(y, value_range, loss)
        targets = reader.read(y, "y")
        require_pairs(inputs, targets, "x and y")
        if value_range is not None and partition == "dirichlet":
            raise UsageError("partition='dirichlet' deals by label, and the targets are numbers: take shards")
        most = _rows_of_persons(persons, rows_per_person)
        schema = ArraySchema.of(inputs.shape[1:], reader.target, most)
        outside = None if isinstance(test, int | float) else _test_table(test, reader, inputs.shape[1:], most)
        share = float(test) if isinstance(test, int | float) else 0.0
        owners = None if by is None else labels_of(by, "by")
        if owners is not None:
            require_pairs(inputs, owners, "x and by")
        table, method = Table(inputs, targets), _method(partition, owners, options)
        if persons is not None:
            table = table.owned_by(*persons_of(persons, len(table)))
            _require_other_persons(table, outside)
        return cls._dealt(schema, table, clients, method, owners, share, outside, test_at, seed)

    @classmethod
    @public
    def from_clients(
        cls,
        clients: Sequence[tuple[ArrayLike, ...]] | Mapping[str, tuple[ArrayLike, ...]],
        *,
        test: float | tuple[ArrayLike, ...] = 0.2,
        test_at: TestAt = "federation",
        seed: int = 0,
        value_range: tuple[float, float] | None = None,
        loss: RegressionLoss = "squared",
        rows_per_person: int | None = None,
    ) -> Self:
        """Each client's own examples and targets, in a list, or by name in a dict; or examples, targets and persons,
        see `from_arrays`. Raises DataError, UsageError."""
        pairs, owners = _pairs(clients)
        names = list(map(str, clients)) if isinstance(clients, Mapping) else _numbered(len(pairs))
        inputs = [inputs_of(x, f"x of {name}") for name, (x, _) in zip(names, pairs, strict=True)]
        read = labels_of if value_range is None else _reader(pairs[0][1], value_range, loss).read
        targets = [read(y, f"y of {name}") for name, (_, y) in zip(names, pairs, strict=True)]
        for name, own, its in zip(names, inputs, targets, strict=True):
            require_pairs(own, its, name)
            if own.shape[1:] != inputs[0].shape[1:]:
                raise UsageError(
                    f"an example of {name} has the shape {own.shape[1:]}, of {names[0]} {inputs[0].shape[1:]}"
                )
        by = np.repeat(names, [len(own) for own in inputs])
        x, y = np.concatenate(inputs), np.concatenate(targets)
        return cls.from_arrays(
            x,
            y,
            by=by,
            test=test,
            test_at=test_at,
            seed=seed,
            value_range=value_range,
            loss=loss,
            persons=_all_persons(names, inputs, owners),
            rows_per_person=rows_per_person,
        )

    @classmethod
    @public
    def from_frame(
        cls,
        frame: Any,
        target: str,
        *,
        by: str | None = None,
        clients: int | None = None,
        partition: str = "iid",
        test: Any = 0.2,
        test_at: TestAt = "federation",
        seed: int = 0,
        value_range: tuple[float, float] | None = None,
        loss: RegressionLoss = "squared",
        person: str | None = None,
        rows_per_person: int | None = None,
        **options: Any,
    ) -> Self:
        """One pandas data frame, dealt as in `from_arrays`, or by a column that says which client a row is from.

        Numbers are taken as they are, booleans as 1 and 0, all other columns one-hot. `test` may be a frame. `person`
        is the column that says whose a row is, see `persons` of `from_arrays`; it is no input.
        Raises DataError, UsageError.
        """
        if not is_frame(frame):
            raise UsageError(f"a data frame is needed, and this is a {type(frame).__name__}")
        frame, test = named(frame), named(test) if is_frame(test) else test
        target, by = str(target), None if by is None else str(by)
        person = None if person is None else str(person)
        frames = [frame, *([test] if is_frame(test) else [])]
        if by is not None and is_frame(test) and by not in test.columns:
            frames[1] = test.assign(**{by: ""})
        reader = FrameReader(frames, target, [name for name in (by, person) if name is not None])
        if by is not None and frame[by].isna().any():
            raise DataError(f"column {by!r} does not say which client {int(frame[by].isna().sum())} rows are from")
        made = cls.from_arrays(
            reader.inputs(frame, "the frame"),
            _target(frame, target),
            clients=clients,
            partition=partition,
            by=None if by is None else frame[by].astype(str).to_numpy(),
            test=_of_frame(reader, test, "test", target, person) if is_frame(test) else test,
            test_at=test_at,
            seed=seed,
            value_range=value_range,
            loss=loss,
            persons=None if person is None else _persons_in(frame, person, "the frame"),
            rows_per_person=rows_per_person,
            **options,
        )
        return made._of_table(reader, person)

    @classmethod
    @public
    def from_frames(
        cls,
        frames: Sequence[Any] | Mapping[str, Any],
        target: str,
        *,
        test: Any = 0.2,
        test_at: TestAt = "federation",
        seed: int = 0,
        value_range: tuple[float, float] | None = None,
        loss: RegressionLoss = "squared",
        person: str | None = None,
        rows_per_person: int | None = None,
    ) -> Self:
        """One pandas data frame a client, in a list, or by name in a dict. `person` is the column that says whose a row
        is. Raises DataError, UsageError."""
        items, given = as_list(frames)
        items, test, target = [named(item) for item in items], named(test) if is_frame(test) else test, str(target)
        names = given or _numbered(len(items))
        person = None if person is None else str(person)
        leave_out = [] if person is None else [person]
        reader = FrameReader([*items, *([test] if is_frame(test) else [])], target, leave_out)
        pairs = {name: _of_frame(reader, frame, name, target, person) for name, frame in zip(names, items, strict=True)}
        outside = _of_frame(reader, test, "test", target, person) if is_frame(test) else test
        made = cls.from_clients(
            pairs,
            test=outside,
            test_at=test_at,
            seed=seed,
            value_range=value_range,
            loss=loss,
            rows_per_person=rows_per_person,
        )
        return made._of_table(reader, person)

    def __len__(self) -> int:
        """K."""
        return len(self.shares)

    @property
    def sizes(self) -> tuple[int, ...]:
        """(K,) training examples by client."""
        return tuple(len(share) for share in self.shares)

    @property
    def units(self) -> tuple[int, ...]:
        """(K,) persons with training examples by client; where persons are not known, examples."""
        persons = self.table.persons
        return self.sizes if persons is None else tuple(len(np.unique(persons[share])) for share in self.shares)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the C classes, in the order of the model's outputs; none where the target is a number."""
        return self.schema.labels

    @property
    def input_shape(self) -> tuple[int, ...]:
        """D."""
        return self.schema.input_shape

    def __repr__(self) -> str:
        what = f"{len(self.labels)} classes" if self.labels else "one number to predict"
        tested = sum(map(len, self.tests)) if self.tests is not None else len(self.test) if self.test is not None else 0
        whose = "" if self.table.persons is None else ", by person"
        return (
            f"Federation({len(self)} clients, {sum(self.sizes)} training and {tested} test examples{whose}, inputs "
            f"{self.input_shape}, {what})"
        )

    @classmethod
    def _dealt(
        cls,
        schema: Schema,
        table: Table,
        clients: int | None,
        method: PartitionMethod,
        owners: NDArray[Any] | None,
        share: float,
        outside: Table | None,
        test_at: TestAt,
        seed: int,
    ) -> Self:
        if test_at not in ("federation", "clients"):
            raise UsageError(f'test_at={test_at!r}: "federation" or "clients"')
        if test_at == "clients" and outside is not None:
            raise UsageError('test_at="clients" holds a share of each client\'s own out: test= is to be that share')
        if not 0 <= share < 1:
            raise UsageError(f"test={share:g}: a share of the examples, from 0 to below 1, or a pair of arrays")
        generator, names = np.random.default_rng(whole(seed, "seed", 0)), None
        if owners is not None:
            names = [str(name) for name in np.unique(owners)]
            if clients not in (None, len(names)):
                raise UsageError(f"clients={clients}, and by= names {len(names)}: leave clients out")
            clients = len(names)
        if clients is None:
            raise UsageError("clients= says how many there are, or by= which one each example is from")
        clients = whole(clients, "clients", 1)
        held = _held_out(table, share if test_at == "federation" else 0.0, generator)
        kept = np.setdiff1d(np.arange(len(table)), held)
        test = outside if outside is not None else table.take(held) if len(held) else None
        train = table.take(kept)
        sites = None if owners is None else owners[kept]
        dealt = method.deal(train.targets, train.inputs, clients, generator, sites=sites, persons=train.persons)
        train, shares = _as_seen(train, dealt)
        if test_at == "federation":
            return cls(schema, train, shares, test=test, names=names)
        held_by = [_own_test(own, train, share) for own in shares]
        tests = [own[is_test] for own, is_test in zip(shares, held_by, strict=True)] if share else None
        left = [own[~is_test] for own, is_test in zip(shares, held_by, strict=True)]
        return cls(schema, train, left, tests=tests, names=names)

    def _of_table(self, reader: FrameReader, person: str | None) -> Self:
        """The same, of data frames: files of the same columns can be read by its schema."""
        assert isinstance(self.schema, ArraySchema)
        schema = reader.schema(self.schema.target, person, self.schema.rows_per_person)
        return type(self)(
            schema, self.table, self.shares, test=self.test, tests=self.tests, names=self.names, columns=reader.names
        )


def _method(partition: str, owners: NDArray[Any] | None, options: dict[str, Any]) -> PartitionMethod:
    """The way of dealing. Raises UsageError for one that there is not, or a setting that it has not."""
    if owners is not None and (partition != "iid" or options):
        raise UsageError("by= says who has what: leave partition and its settings out")
    if owners is not None:
        return _PARTITIONS.validate_python({"name": "natural"})
    if partition not in _NAMES:
        raise UsageError(
            f"partition={partition!r}{did_you_mean(str(partition), _NAMES)}; there are: {', '.join(_NAMES)}"
        )
    known = type(_PARTITIONS.validate_python({"name": partition})).model_fields.keys() - {"name"}
    for name in options.keys() - known:
        near = did_you_mean(name, [*known, *_ARGUMENTS])
        raise UsageError(f"{name}= is no argument, and no setting of partition={partition!r}{near}")
    try:
        return _PARTITIONS.validate_python({"name": partition, **options})
    except ValidationError as error:
        raise UsageError(f"partition={partition!r}: {explain(error, words=argument)}") from None


def _held_out(table: Table, share: float, generator: np.random.Generator) -> Rows:
    """Rows for testing, in rising order; of a person all or none."""
    chosen = generator.permutation(table.units)[: round(share * table.units)]
    return np.sort(chosen) if table.persons is None else np.flatnonzero(np.isin(table.persons, chosen))


def _own_test(own: Rows, train: Table, share: float) -> NDArray[np.bool_]:
    """Which of a client's rows it tests on: the first, or all of the first persons; one is left for training."""
    units = own if train.persons is None else train.persons[own]
    found, first = np.unique(units, return_index=True)
    chosen = found[np.argsort(first)][: min(len(found) - 1, round(share * len(found)))]
    return np.isin(units, chosen)


def _as_seen(train: Table, dealt: Partition) -> tuple[Table, list[Rows]]:
    """The table with what each client's instruments make of its rows, and whose they are."""
    if dealt.transform is None:
        return train, list(dealt.shares)
    inputs = np.empty_like(train.inputs)
    for client, rows in enumerate(dealt.shares):
        inputs[rows] = dealt.inputs(client, train.inputs)
    return replace(train, inputs=inputs), list(dealt.shares)


def _test_table(
    test: Any, reader: ClassReader | NumberReader, shape: tuple[int, ...], rows_per_person: int | None
) -> Table:
    needed = "a pair of arrays (x_test, y_test)" if rows_per_person is None else "arrays (x_test, y_test, persons_test)"
    try:
        x, y, *persons = test
        (owners,) = persons if rows_per_person is not None else (None, *persons)
    except (TypeError, ValueError):
        raise UsageError(f"test is a share of the examples, 0 for none, or {needed}") from None
    inputs, targets = inputs_of(x, "x of test"), reader.read(y, "y of test")
    require_pairs(inputs, targets, "test")
    if inputs.shape[1:] != shape:
        raise UsageError(f"an example of test has the shape {inputs.shape[1:]}, one of the training data {shape}")
    table = Table(inputs, targets)
    return table if owners is None else table.owned_by(*persons_of(owners, len(table), "persons of test"))


def _rows_of_persons(persons: ArrayLike | None, rows_per_person: int | None) -> int | None:
    if persons is not None:
        return USUAL_ROWS if rows_per_person is None else whole(rows_per_person, "rows_per_person", 1)
    if rows_per_person is not None:
        raise UsageError(f"rows_per_person={rows_per_person}, and nothing says whose an example is")
    return None


def _require_other_persons(table: Table, test: Table | None) -> None:
    both = set(table.person_names).intersection(() if test is None else test.person_names)
    if both:
        raise DataError(
            f"{len(both)} persons of test are in the training data too: nobody may be in both, split by person"
        )


def _reader(y: ArrayLike, value_range: tuple[float, float] | None, loss: RegressionLoss) -> ClassReader | NumberReader:
    """Of targets such as those of `y`. Raises DataError, UsageError."""
    if value_range is None:
        if loss != "squared":
            raise UsageError(f"loss={loss!r} is of numbers: say which, value_range=(smallest, largest)")
        return ClassReader(classes_of(labels_of(y)))
    try:
        return NumberReader(NumberTarget(name="y", kind="numeric", range=value_range, loss=loss))
    except ValidationError as error:
        raise UsageError(f"value_range={value_range!r}: {explain(error)}") from None


def _pairs(clients: Any) -> tuple[list[tuple[ArrayLike, ArrayLike]], list[ArrayLike]]:
    """What each client has, and whose that is if it is said. Raises UsageError for anything but pairs, one at least, or
    three arrays each."""
    pairs = clients.values() if isinstance(clients, Mapping) else clients
    if not isinstance(pairs, Iterable) or is_frame(pairs) or isinstance(pairs, str | np.ndarray):
        raise UsageError(f"clients: a list of pairs [(x0, y0), ...] is needed, or a dict, not a {type(pairs).__name__}")
    found = list(pairs)
    if not found:
        raise UsageError("clients: there has to be one")
    for number, pair in enumerate(found):
        if not isinstance(pair, tuple | list) or len(pair) not in (2, 3):
            raise UsageError(f"clients: number {number} has to be a pair of arrays (x, y), examples and their targets")
        if len(pair) != len(found[0]):
            raise UsageError(
                f"clients: number {number} does not say whose its examples are, (x, y, persons), as others do"
            )
    return [(pair[0], pair[1]) for pair in found], [pair[2] for pair in found if len(pair) == 3]


def _all_persons(names: Sequence[str], inputs: Sequence[Sized], persons: Sequence[ArrayLike]) -> NDArray[Any] | None:
    """(N,) whose all clients' examples are; None where it is not said."""
    if not persons:
        return None
    found = []
    for name, own, owners in zip(names, inputs, persons, strict=True):
        numbers, known = persons_of(owners, len(own), f"persons of {name}")
        found.append(np.array(known)[numbers])
    return np.concatenate(found)


def _of_frame(reader: FrameReader, frame: Any, which: str, target: str, person: str | None) -> tuple[ArrayLike, ...]:
    """Inputs and targets of a frame, and persons where a column says them."""
    read = reader.inputs(frame, which), _target(frame, target)
    return read if person is None else (*read, _persons_in(frame, person, which))


def _persons_in(frame: Any, person: str, which: str) -> NDArray[Any]:
    """(N,) text. Raises DataError for a row that is nobody's."""
    if missing := np.flatnonzero(frame[person].isna().to_numpy()).tolist():
        raise DataError(f"column {person!r} of {which} does not say in {rows_in_words(missing)} {EXPECTED}")
    names: NDArray[Any] = frame[person].astype(str).to_numpy(object)
    return names


def _numbered(count: int) -> list[str]:
    return [f"client-{number:0{len(str(count - 1))}d}" for number in range(count)]


def _target(frame: Any, target: str) -> NDArray[Any]:
    if target not in frame.columns:
        raise UsageError(f"test has no column {target!r}")
    column: NDArray[Any] = frame[target].to_numpy()
    return column
