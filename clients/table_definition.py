"""The content of a table's schema file, checked; what it means is in `tabular_schema`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from fedclaw.clients.columns import AnyColumn, Categorical, Numeric, Unseen
from fedclaw.clients.definitions import Labels, Text, Weights, as_text, distinct, sized, weights_of
from fedclaw.clients.persons import RowsPerPerson, require_rows_of_persons
from fedclaw.clients.values import normal
from fedclaw.learning.tasks.regression import NumberTarget
from fedclaw.protocol.frozen import Frozen, Written

MISSING = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "None", "?")
MAX_FEATURES = 100_000


class ClassTarget(Frozen):
    """The column to predict, of classes: labels, or a map from raw values to labels (several values may share one)."""

    name: Text = Field(min_length=1)
    labels: Annotated[
        Annotated[Labels, Tag("list")] | Annotated[dict[str, Text], Tag("map")],
        Discriminator(lambda value: "map" if isinstance(value, dict) else "list"),
    ]
    weights: Weights | None = None
    """How much an example counts in the loss, by label; 1 if not stated."""

    @field_validator("labels", mode="before")
    @classmethod
    def _text_keys(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        keys = [as_text(raw) for raw in value]
        distinct(tuple(keys))
        return dict(zip(keys, value.values(), strict=True))

    @model_validator(mode="after")
    def _two_classes(self) -> Self:
        if len(self.classes) < 2:
            raise ValueError("labels must name at least two classes")
        weights_of(self.classes, self.weights)
        return self

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; for a map in the order in which they first appear."""
        return tuple(dict.fromkeys(self.labels.values())) if isinstance(self.labels, dict) else self.labels

    @property
    def codes(self) -> dict[str, int]:
        """Raw value to class index."""
        index = {label: i for i, label in enumerate(self.classes)}
        if isinstance(self.labels, dict):
            return {raw: index[label] for raw, label in self.labels.items()}
        return index


class NumberColumn(NumberTarget):
    """The column to predict, a number: a row with one out of range is refused."""

    name: Text = Field(min_length=1)

    @property
    def column(self) -> Numeric:
        """The target read as a column: the same cells are numbers, and the same bounds hold."""
        return Numeric(name=self.name, kind="numeric", range=self.range)


class TableDefinition(Written):
    """The content of a table's schema file."""

    columns: Annotated[tuple[AnyColumn, ...], AfterValidator(sized(1, MAX_FEATURES))]
    target: ClassTarget | NumberColumn
    missing: tuple[Text, ...] = MISSING
    standardise: Literal["schema", "site", "federated"] = "schema"
    extra: Literal["refuse", "ignore"] = "refuse"
    delimiter: Literal[",", ";", "\t", "|"] = ","
    unseen: Unseen | None = None
    """Of all categorical columns that do not say it themselves; None: refuse_row."""
    identifiers: tuple[Text, ...] | None = None
    """Columns that say which row is which: allowed, never an input, and written beside a prediction."""
    person: Text | None = None
    """The column that says whose a row is; never an input. None: a guarantee is for each row."""
    rows_per_person: RowsPerPerson | None = None
    """How many rows of a person, its first ones, statistics and metrics use; 1 if not stated."""

    @property
    def resolved(self) -> tuple[AnyColumn, ...]:
        """The columns, what is said of all of them put into each."""
        if self.unseen is None:
            return self.columns
        return tuple(
            column.model_copy(update={"unseen": self.unseen})
            if isinstance(column, Categorical) and column.unseen is None
            else column
            for column in self.columns
        )

    @model_validator(mode="after")
    def _persons(self) -> Self:
        require_rows_of_persons(self.rows_per_person, self.person)
        inputs = {normal(name) for name in (*(column.name for column in self.columns), self.target.name)}
        if self.person is not None and normal(self.person) in inputs:
            raise ValueError(
                f"person: {self.person!r} is an input or the target too, and whose a row is can be neither: take it "
                "out of columns"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        distinct((*(column.name for column in self.columns), self.target.name, *(self.identifiers or ())))
        if sum(len(column.features) for column in self.resolved) > MAX_FEATURES:
            raise ValueError(f"more than {MAX_FEATURES} features in all columns together")
        if self.standardise != "schema":
            self._check_numeric()
        return self

    def _check_numeric(self) -> None:
        for column in self.columns:
            if not isinstance(column, Numeric):
                continue
            if column.center is not None or column.scale is not None:
                raise ValueError(
                    f"column {column.name!r} has a center or scale, and standardise: {self.standardise} has none"
                )
            if column.range is None and self.standardise == "federated":
                raise ValueError(
                    f"column {column.name!r} has no range, and standardise: federated needs one: add range: "
                    "[smallest, largest], from what is known of such values and not from the data"
                )


class ClassTable(TableDefinition):
    """A table whose target is of classes."""

    target: ClassTarget


class NumberTable(TableDefinition):
    """A table whose target is a number."""

    target: NumberColumn


def table_of(plain: Mapping[str, Any]) -> type[TableDefinition]:
    """Which of the two a schema file is to be read as: a target that has a kind is no class."""
    target = plain.get("target")
    return NumberTable if isinstance(target, Mapping) and "kind" in target else ClassTable
