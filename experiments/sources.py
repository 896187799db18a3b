"""Where experiments' examples come from: scikit-learn's sets, images that are made, or data of one's own."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from experiments.persons import GroupedRows
from experiments.synthetic_images import SyntheticImages, make_images
from fedclaw.catalogue import did_you_mean
from fedclaw.clients.arrays import persons_of
from fedclaw.clients.columns import numbers
from fedclaw.clients.table_definition import MISSING
from fedclaw.clients.tables import DELIMITERS, Content, Wanted, read_blocks, read_header
from fedclaw.clients.values import DecimalMark, Markers, number_of
from fedclaw.errors import DataError, UsageError
from fedclaw.files import sha256_file
from fedclaw.learning.tasks.regression import RegressionLoss
from fedclaw.learning.workload import FileFormat, Floats
from fedclaw.protocol.frozen import Frozen


class DatasetSettings(Frozen):
    """conf/dataset/*.yaml."""

    name: Literal["breast_cancer", "diabetes", "friedman1", "digits", "synthetic_images", "csv", "images"]
    sites: int = Field(default=4, ge=1, le=100)
    """Sites that get a directory each. A simulation in memory has a number of its own, without this limit."""
    public: float = Field(default=0.15, gt=0, lt=0.9)
    """Share of the examples that are the coordinator's public reference set."""
    test: float = Field(default=0.25, ge=0, lt=0.9)
    """Share of each site's examples that it holds back for testing: one, if it has two, or more; 0: none at all."""
    seed: int = Field(default=0, ge=0)
    """Of the deal: what is public, and who has what."""
    synthetic: SyntheticImages | None = None
    """What images to make; null: the usual ones."""
    persons: GroupedRows | None = None
    """Rows are grouped into persons, who are dealt as a whole; null: each row is by itself."""

    data: Path | None = None
    """csv: the table, a CSV file with a header. images: a directory with one of images (PNG, JPEG) for each label."""
    target: str | None = None
    """csv: the column to predict; null: the last one."""
    site_column: str | None = None
    """csv: the column that says where a row is from; it is no input."""
    identifiers: tuple[str, ...] | None = None
    """csv: columns that say which row is which; they are no inputs."""
    person: str | None = None
    """csv: the column that says whose a row is, for all of whose rows there is one guarantee; it is no input."""
    written: FileFormat | None = None
    """csv: how the file is written; null: with commas and decimal points, in UTF-8."""
    range: tuple[float, float] | None = None
    """csv: smallest and largest value of a target that is a number, by what is known of it; null: it is of classes."""
    loss: RegressionLoss | None = None
    """Of a target that is a number: squared (null), huber or poisson."""
    content: str | None = None
    """Data of one's own: its SHA-256, which `with_content` fills in; null: nobody has read it yet."""

    @property
    def workload(self) -> str:
        """The workload whose data this is: tabular or vision."""
        return "tabular" if self.name in ("breast_cancer", "csv", *_OF_NUMBERS) else "vision"

    @property
    def is_of_numbers(self) -> bool:
        """Whether what is predicted is a number, not a class."""
        return self.name in _OF_NUMBERS or self.range is not None

    @property
    def origin(self) -> Path:
        """Where data of one's own is."""
        assert self.data is not None
        return self.data

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what only data of one's own has: the other sets' runs keep the digests that they had before."""
        plain: dict[str, Any] = handler(self)
        numbers = () if self.is_of_numbers else ("range", "loss")
        left_out, unless_null = (numbers, "content") if self.name in _OWN else (_OWN_SETTINGS, "loss")
        if_null = (unless_null, "persons", "person")
        return {
            key: value
            for key, value in plain.items()
            if key not in left_out and (key not in if_null or value is not None)
        }

    @model_validator(mode="after")
    def _own_data_is_named(self) -> Self:
        if self.name not in _OWN:
            if given := [name for name in _OWN_SETTINGS if getattr(self, name) is not None]:
                raise ValueError(f"{given[0]} is for dataset=csv or dataset=images, not for {self.name}")
            return self
        if self.data is None:
            raise ValueError(f"dataset={self.name} needs data=PATH")
        if self.name == "images" and (self.target or self.site_column or self.person):
            raise ValueError("target and a site's or a person's column are of tables; a directory of images has none")
        if self.person is not None and self.persons is not None:
            raise ValueError("person names the column that says whose a row is, and persons would group rows at random")
        return self

    @model_validator(mode="after")
    def _loss_is_of_numbers(self) -> Self:
        if self.loss is not None and not self.is_of_numbers:
            raise ValueError(f"loss is for a target that is a number, and dataset={self.name} has classes (range=null)")
        return self

    @model_validator(mode="after")
    def _synthetic_has_its_settings(self) -> Self:
        if self.synthetic is not None and self.name != "synthetic_images":
            raise ValueError(f"synthetic is for dataset=synthetic_images, not for {self.name}")
        return self


PERSON = "person"
"""The column of a table that says whose a row is."""
_OWN = ("csv", "images")
_FEW_CLASSES = 20
# Up to so many labels nobody wonders that they are numbers.
_OWN_SETTINGS = ("data", "target", "site_column", "identifiers", "person", "written", "range", "content")
_OF_NUMBERS = ("diabetes", "friedman1")
_FRIEDMAN_ROWS = 2000
_PARTS = 5
"""Of a number's range: what counts as one label for who gets which rows."""
_FEWEST_ROWS, _MOST_LEVELS = 20, 100
_MARKERS = Markers(MISSING)
_IMAGES = frozenset({".png", ".jpg", ".jpeg"})


@dataclass(frozen=True, eq=False)
class Source:
    """inputs (N, F) or (N, height, width) in the data's own units; targets (N,), named classes or numbers."""

    workload: str
    inputs: NDArray[Any]
    targets: NDArray[Any]
    features: tuple[str, ...]
    labels: tuple[str, ...]
    brightest: float = 1.0
    """Of an image's pixel."""
    sites: NDArray[np.int64] | None = None
    """(N,) where each row is from, if the data says so."""
    site_names: tuple[str, ...] | None = None
    """What the data calls them, in the order of the numbers in `sites`."""
    target: str = "diagnosis"
    """Of a table, the name of the column of targets."""
    owners: NDArray[np.int64] | None = None
    """(N,) whose each row is, where rows are grouped into persons."""
    says_whose: bool = False
    """Whether files and schema say so."""
    range: tuple[float, float] | None = None
    """Of targets that are numbers: the smallest and the largest there can be; then there are no labels."""
    loss: RegressionLoss = "squared"

    @property
    def groups(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """By which rows are told apart when they are dealt, (N,), and names: the labels, or parts of the range."""
        if self.range is None:
            return self.targets, self.labels
        edges = np.linspace(*self.range, _PARTS + 1)
        parts = np.searchsorted(edges[1:-1], self.targets, side="right")
        return parts, tuple(f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges.tolist()))


def load_source(settings: DatasetSettings) -> Source:
    """The whole data set, not yet dealt. Raises DataError for data of one's own that cannot be used, UsageError where
    there is none."""
    source, persons = _load(settings), settings.persons
    if persons is None:
        return source
    return replace(source, owners=persons.owners(len(source.targets)), says_whose=persons.unit == "person")


def _load(settings: DatasetSettings) -> Source:
    _require_own_data(settings)
    if settings.name == "csv":
        return load_table(settings)
    if settings.name == "images":
        return load_images(settings)
    if settings.name == "synthetic_images":
        wanted = settings.synthetic or SyntheticImages()
        made = make_images(wanted)
        labels = tuple(str(label) for label in range(wanted.labels))
        return Source(settings.workload, made.images, made.targets, (), labels, 255.0, made.writers)
    from sklearn.datasets import load_breast_cancer, load_digits

    if settings.name == "breast_cancer":
        data = load_breast_cancer()
        features = tuple(str(feature).replace(" ", "_") for feature in data.feature_names)
        return Source(
            settings.workload, data.data, data.target, features, tuple(str(label) for label in data.target_names)
        )
    if settings.name in _OF_NUMBERS:
        return _of_numbers(settings)
    data = load_digits()
    labels = tuple(str(label) for label in range(10))
    return Source(settings.workload, data.images, data.target, (), labels, float(data.images.max()))


def _of_numbers(settings: DatasetSettings) -> Source:
    """scikit-learn's diabetes table (Efron, Hastie, Johnstone, Tibshirani 2004), whose score its description says lies
    between 25 and 346; or Friedman's first function (1991) with noise, cut off where no noise of 5 deviations reaches.
    """
    from sklearn.datasets import load_diabetes, make_friedman1

    loss = settings.loss or "squared"
    if settings.name == "diabetes":
        data = load_diabetes(scaled=False)
        names = tuple(str(name) for name in data.feature_names)
        return Source("tabular", data.data, data.target, names, (), target="progression", range=(25, 346), loss=loss)
    inputs, targets = make_friedman1(_FRIEDMAN_ROWS, noise=1.0, random_state=settings.seed)
    names = tuple(f"x{number + 1}" for number in range(inputs.shape[1]))
    low, high = (0.0, 35.0) if loss == "poisson" else (-5.0, 35.0)
    targets = np.clip(targets, low, high)
    return Source("tabular", inputs, targets, names, (), target="y", range=(low, high), loss=loss)


def schema_of(source: Source, public: NDArray[np.int64]) -> dict[str, Any]:
    """The schema file's content; its constants come from the public rows, so that no site's data goes into them."""
    inputs = source.inputs[public]
    if source.workload == "vision":
        scaled = inputs / source.brightest
        return {
            **({"person": "{person}_*"} if source.says_whose else {}),
            "shape": [1, *inputs.shape[1:]],
            "labels": list(source.labels),
            "mean": [round(float(scaled.mean()), 4)],
            "std": [round(float(scaled.std()), 4)],
        }
    columns = [
        {"name": name, "kind": "numeric", **_constants(values[~np.isnan(values)])}
        for name, values in zip(source.features, inputs.T, strict=True)
    ]
    persons = {"person": PERSON} if source.says_whose else {}
    return {**persons, "columns": columns, "target": _target_of(source)}


def _target_of(source: Source) -> dict[str, Any]:
    if source.range is None:
        return {"name": source.target, "labels": list(source.labels)}
    return {"name": source.target, "kind": "numeric", "range": list(source.range), "loss": source.loss}


def pixels(source: Source, inputs: NDArray[Any]) -> NDArray[np.uint8]:
    """Images as a file holds them: a byte for a pixel."""
    if inputs.dtype == np.uint8:
        return inputs
    return np.round(inputs / source.brightest * 255).astype(np.uint8)


def standardised(source: Source, schema: Mapping[str, Any], inputs: NDArray[Any]) -> Floats:
    """(N, *D) float32 as the workload's schema makes them of the file that holds `inputs`."""
    if source.workload == "vision":
        mean, std = np.float32(schema["mean"][0]), np.float32(schema["std"][0])
        scaled: Floats = pixels(source, inputs)[:, None].astype(np.float32)
        scaled /= np.float32(255)
        scaled -= mean
        scaled /= std
        return scaled
    centers = np.array([column["center"] for column in schema["columns"]])
    scales = np.array([column["scale"] for column in schema["columns"]])
    table: Floats = ((inputs - centers) / scales).astype(np.float32)
    table[np.isnan(table)] = 0.0
    return table


def _constants(known: NDArray[np.float64]) -> dict[str, float]:
    """Of a column's known values; those of one that is unknown or never changes leave it as it is."""
    scale = _short(float(known.std())) if len(known) else 0.0
    return {"center": _short(float(known.mean())) if len(known) else 0.0, "scale": scale or 1.0}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def load_table(settings: DatasetSettings) -> Source:
    """A CSV file with a header: columns of numbers as they are, NaN where the cell says 'not known'; others as one
    column of 0 and 1 for each value. Columns without a name, an index that was written with the table, are left out.

    Raises DataError naming the file, and the column or row that cannot be used.
    """
    path, written = settings.origin, settings.written or FileFormat()
    columns = read_table(path, written)
    target, identifiers = settings.target or list(columns)[-1], settings.identifiers or ()
    used = (target, *filter(None, (settings.site_column, settings.person)))
    for name in (*used, *identifiers):
        if name not in columns:
            raise DataError(f"{path}: there is no column {name!r}{did_you_mean(name, columns)}")
    for name in used:
        if "" in columns[name]:
            raise DataError(f"{path}, row {columns[name].index('') + 1}: no value in column {name!r}; fill it in")
    labels: tuple[str, ...] = ()
    targets: NDArray[Any]
    if settings.range is None:
        values, numbered = np.unique(columns.pop(target), return_inverse=True)
        labels, targets = tuple(str(value) for value in values), numbered.astype(np.int64)
        _require_classes(path, target, labels, len(targets), written)
    else:
        targets = _target_numbers(path, target, columns.pop(target), settings)
    if len(np.unique(targets)) < 2:
        raise DataError(f"{path}: column {target!r} has one value alone, so there is nothing to learn")
    sites = None if settings.site_column is None else np.unique(columns.pop(settings.site_column), return_inverse=True)
    owners = None if settings.person is None else _owners(path, columns.pop(settings.person), sites)
    features = {
        name: values
        for column, cells in columns.items()
        if column not in identifiers
        for name, values in _numbers(path, column, cells, written.decimal)
    }
    if not features:
        raise DataError(f"{path}: there is no column to predict {target!r} from")
    return Source(
        settings.workload,
        np.column_stack(list(features.values())),
        targets,
        tuple(features),
        labels,
        sites=None if sites is None else sites[1].astype(np.int64),
        site_names=None if sites is None else tuple(str(site) for site in sites[0]),
        target=target,
        owners=owners,
        says_whose=owners is not None,
        range=settings.range,
        loss=settings.loss or "squared",
    )


def _owners(path: Path, cells: list[str], sites: tuple[NDArray[Any], NDArray[Any]] | None) -> NDArray[np.int64]:
    """(N,) whose each row is. Who has rows at two sites is one person at each: no site knows of the other's."""
    persons, _ = persons_of(cells, len(cells), f"{path}: the column of persons")
    if sites is None:
        return persons
    pairs = persons * len(sites[0]) + sites[1]
    return np.unique(pairs, return_inverse=True)[1].astype(np.int64)


def _require_classes(path: Path, target: str, labels: Sequence[str], rows: int, written: FileFormat) -> None:
    """Raise DataError for a measured number that would be taken for classes, nearly each row its own."""
    if len(labels) <= _FEW_CLASSES or 2 * len(labels) <= rows:
        return
    if not numbers(labels, Markers(()), written.decimal)[1].any():
        raise DataError(
            f"{path}: column {target!r} has {len(labels)} different numbers in {rows} rows, too many for classes; to "
            "predict the number itself write the range of such values, dataset.range=[SMALLEST,LARGEST]"
        )


def _target_numbers(path: Path, target: str, cells: list[str], settings: DatasetSettings) -> NDArray[np.float64]:
    """(N,) within the range that the settings say. Raises DataError naming the row."""
    assert settings.range is not None
    values, bad = numbers(cells, Markers(()), (settings.written or FileFormat()).decimal)
    low, high = settings.range
    wrong = bad | np.isnan(values) | (values < low) | (values > high)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"{path}, row {row + 1}: {cells[row]!r} in column {target!r} is no number from {low:g} to {high:g} (range=)"
        )
    return values


def read_table(path: Path, written: FileFormat) -> dict[str, list[str]]:
    """The cells of a CSV file by the names in its header. Raises DataError."""
    names = tuple(filter(None, read_header(path, written)))
    if len(names) == 1 and (found := next((mark for mark in DELIMITERS if mark in names[0]), None)):
        raise DataError(
            f'{path}: written with {DELIMITERS[found]} between the cells? dataset.written.delimiter="{found}"'
        )
    if not names or len(set(names)) != len(names):
        raise DataError(f"{path}: a table has a header of different names")
    columns: dict[str, list[str]] = {name: [] for name in names}
    for block in read_blocks(path, written, Wanted(required=names, ignore_others=True), Content()):
        if block.ragged:
            raise DataError(f"{path}: {next(iter(block.ragged.values()))}")
        for name in names:
            columns[name] += map(str, block.columns[name])
    if len(columns[names[0]]) < _FEWEST_ROWS:
        raise DataError(f"{path}: a table to deal out has at least {_FEWEST_ROWS} rows")
    return columns


def _numbers(path: Path, column: str, cells: Sequence[str], mark: DecimalMark) -> list[tuple[str, NDArray[np.float64]]]:
    """A column's numbers, or what stands for its words. Raises DataError for one that is neither."""
    values, bad = numbers(cells, _MARKERS, mark)
    if not bad.any():
        if np.isnan(values).all():
            raise DataError(f"{path}: column {column!r} has no value in any row; leave it out")
        return [(column, values)]
    known = [cell for cell in cells if not _MARKERS.holds(cell, mark)]
    if sum(number_of(cell, mark) is not None for cell in known) > len(known) / 2:
        row = int(np.flatnonzero(bad)[0])
        raise DataError(f"{path}, row {row + 1}, column {column!r}: {cells[row]!r} is no number, and most others are")
    levels = sorted(set(known))
    if len(levels) > _MOST_LEVELS:
        raise DataError(
            f"{path}: column {column!r} has {len(levels)} different words; if they say which row is which, leave "
            f"it out by dataset.identifiers=[{column}]"
        )
    return [(f"{column}={level}", np.array([float(cell == level) for cell in cells])) for level in levels]


def load_images(settings: DatasetSettings) -> Source:
    """A directory of images for each label in one directory, all of one size, as shades of grey. Raises DataError."""
    from PIL import Image, UnidentifiedImageError

    root = settings.origin
    found = [
        (path, place.name)
        for place in sorted(path for path in root.iterdir() if path.is_dir())
        for path in sorted(place.iterdir())
        if path.suffix.lower() in _IMAGES
    ]
    labels = sorted({label for _, label in found})
    if len(labels) < 2:
        raise DataError(
            f"{root}: a directory for each of two labels or more, with PNG or JPEG images in them, is needed"
        )
    images = []
    for path, _ in found:
        try:
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("L")))
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{path} cannot be read as an image: {error}") from error
        if images[-1].shape != images[0].shape:
            raise DataError(f"{path} is of another size than {found[0][0]}; have one for all")
    targets = np.array([labels.index(label) for _, label in found], np.int64)
    return Source(settings.workload, np.stack(images), targets, (), tuple(labels), 255.0)


def with_content(settings: DatasetSettings) -> DatasetSettings:
    """`settings` with the digest of the content, if it is data of one's own. Raises UsageError where there is none."""
    _require_own_data(settings)
    if settings.name not in _OWN:
        return settings
    return settings.model_copy(update={"content": content_digest(settings.origin)})


def _require_own_data(settings: DatasetSettings) -> None:
    if settings.name == "csv" and not settings.origin.is_file():
        raise UsageError(f"data={settings.data}: there is no such file")
    if settings.name == "images" and not settings.origin.is_dir():
        raise UsageError(f"data={settings.data}: there is no such directory")


def content_digest(origin: Path) -> str:
    """SHA-256 of a file, or of all that is in a directory: other content is another data set."""
    if origin.is_file():
        return sha256_file(origin)
    digest = hashlib.sha256()
    for path in sorted(path for path in origin.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(origin)} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def count_sites(settings: DatasetSettings, column: str) -> int:
    """How many values the column has in the CSV file. Raises DataError for the file, UsageError for the column."""
    columns = read_table(settings.origin, settings.written or FileFormat())
    if column not in columns:
        raise UsageError(f"sites={column}: {settings.origin} has no such column{did_you_mean(column, columns)}")
    return len(set(columns[column]))
