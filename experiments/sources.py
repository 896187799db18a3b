"""Where experiments' examples come from: scikit-learn's sets, images that are made, or data of one's own."""

import csv
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from experiments.synthetic_images import SyntheticImages, make_images
from fedclaw.catalogue import did_you_mean
from fedclaw.errors import DataError
from fedclaw.files import sha256_file
from fedclaw.frozen import Frozen
from fedclaw.workload import Floats


class DatasetSettings(Frozen):
    """conf/dataset/*.yaml."""

    name: Literal["breast_cancer", "digits", "synthetic_images", "csv", "images"]
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

    data: Path | None = None
    """csv: the table, a CSV file with a header. images: a directory with one of images (PNG, JPEG) for each label."""
    target: str | None = None
    """csv: the column to predict; null: the last one."""
    site_column: str | None = None
    """csv: the column that says where a row is from; it is no input."""

    @property
    def workload(self) -> str:
        """The workload whose data this is: tabular or vision."""
        return "tabular" if self.name in ("breast_cancer", "csv") else "vision"

    @property
    def origin(self) -> Path:
        """Where data of one's own is."""
        assert self.data is not None
        return self.data

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what only data of one's own has: the other sets' runs keep the digests that they had before."""
        plain: dict[str, Any] = handler(self)
        if self.name in _OWN:
            return {**plain, "content": content_digest(self.origin)}
        return {key: value for key, value in plain.items() if key not in _OWN_SETTINGS}

    @model_validator(mode="before")
    @classmethod
    def _digest_is_no_setting(cls, plain: Any) -> Any:
        """What `_as_before` adds is for digests alone."""
        return {key: value for key, value in plain.items() if key != "content"} if isinstance(plain, dict) else plain

    @model_validator(mode="after")
    def _own_data_is_there(self) -> Self:
        if self.name not in _OWN:
            if given := [name for name in _OWN_SETTINGS if getattr(self, name) is not None]:
                raise ValueError(f"{given[0]} is for dataset=csv or dataset=images, not for {self.name}")
            return self
        if self.data is None:
            raise ValueError(f"dataset={self.name} needs data=PATH")
        if self.name == "images" and (self.target or self.site_column):
            raise ValueError("target and a site's column are of tables; a directory of images has none")
        if not (self.data.is_file() if self.name == "csv" else self.data.is_dir()):
            raise ValueError(f"data={self.data}: there is no such {'file' if self.name == 'csv' else 'directory'}")
        return self

    @model_validator(mode="after")
    def _synthetic_has_its_settings(self) -> Self:
        if self.synthetic is not None and self.name != "synthetic_images":
            raise ValueError(f"synthetic is for dataset=synthetic_images, not for {self.name}")
        return self


_OWN = ("csv", "images")
_OWN_SETTINGS = ("data", "target", "site_column")
_FEWEST_ROWS, _MOST_LEVELS = 20, 100
_IMAGES = frozenset({".png", ".jpg", ".jpeg"})


@dataclass(frozen=True, eq=False)
class Source:
    """inputs (N, F) or (N, height, width) in the data's own units, targets (N,) as class indices, with names."""

    workload: str
    inputs: NDArray[Any]
    targets: NDArray[np.int64]
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


def load_source(settings: DatasetSettings) -> Source:
    """The whole data set, not yet dealt. Raises DataError for data of one's own that cannot be used."""
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
    data = load_digits()
    labels = tuple(str(label) for label in range(10))
    return Source(settings.workload, data.images, data.target, (), labels, float(data.images.max()))


def schema_of(source: Source, public: NDArray[np.int64]) -> dict[str, Any]:
    """The schema file's content; its constants come from the public rows, so that no site's data goes into them."""
    inputs = source.inputs[public]
    if source.workload == "vision":
        scaled = inputs / source.brightest
        return {
            "shape": [1, *inputs.shape[1:]],
            "labels": list(source.labels),
            "mean": [round(float(scaled.mean()), 4)],
            "std": [round(float(scaled.std()), 4)],
        }
    centers, scales = inputs.mean(axis=0), inputs.std(axis=0)
    columns = [
        {"name": name, "kind": "numeric", "center": _short(center), "scale": _short(scale)}
        for name, center, scale in zip(source.features, centers, scales, strict=True)
    ]
    return {"columns": columns, "target": {"name": source.target, "labels": list(source.labels)}}


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
    return table


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def load_table(settings: DatasetSettings) -> Source:
    """A CSV file with a header: columns of numbers as they are, others as one column of 0 and 1 for each value.

    Raises DataError naming the column and the first row that has no value there, or a column that is not there.
    """
    path = settings.origin
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header, rows = [name.strip() for name in next(reader, [])], [row for row in reader if row]
    if len(rows) < _FEWEST_ROWS or len(set(header)) != len(header):
        raise DataError(f"{path}: a table has a header of different names, and at least {_FEWEST_ROWS} rows")
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise DataError(f"{path}, row {number}: {len(row)} cells, and the header has {len(header)}")
    columns = {name: [row[at].strip() for row in rows] for at, name in enumerate(header)}
    target = settings.target or header[-1]
    for name in (target, *([settings.site_column] if settings.site_column else [])):
        if name not in columns:
            raise DataError(f"{path}: there is no column {name!r}{did_you_mean(name, columns)}")
    for name, cells in columns.items():
        if "" in cells:
            raise DataError(
                f"{path}, row {cells.index('') + 1}: no value in column {name!r}; fill it in, or give the sites "
                "directories of their own, whose schema says what is missing: sites=[DIR,...]"
            )
    labels, targets = np.unique(columns.pop(target), return_inverse=True)
    if len(labels) < 2:
        raise DataError(f"{path}: column {target!r} has one value alone, so there is nothing to learn")
    sites = None if settings.site_column is None else np.unique(columns.pop(settings.site_column), return_inverse=True)
    features = {name: values for column, cells in columns.items() for name, values in _numbers(column, cells)}
    if not features:
        raise DataError(f"{path}: there is no column to predict {target!r} from")
    return Source(
        settings.workload,
        np.column_stack(list(features.values())),
        targets.astype(np.int64),
        tuple(features),
        tuple(str(label) for label in labels),
        sites=None if sites is None else sites[1].astype(np.int64),
        site_names=None if sites is None else tuple(str(site) for site in sites[0]),
        target=target,
    )


def _numbers(column: str, cells: list[str]) -> list[tuple[str, NDArray[np.float64]]]:
    """A column's numbers, or what stands for its words."""
    try:
        numbers = np.array([float(cell) for cell in cells])
    except ValueError:
        numbers = np.full(1, np.nan)
    if np.isfinite(numbers).all():
        return [(column, numbers)]
    levels, member = np.unique(cells, return_inverse=True)
    if len(levels) > _MOST_LEVELS:
        raise DataError(f"column {column!r} has {len(levels)} different words: is it a name or a number of a row?")
    return [(f"{column}={level}", (member == at).astype(np.float64)) for at, level in enumerate(levels)]


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


def content_digest(origin: Path) -> str:
    """SHA-256 of a file, or of all that is in a directory: other content is another data set."""
    if origin.is_file():
        return sha256_file(origin)
    digest = hashlib.sha256()
    for path in sorted(path for path in origin.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(origin)} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def count_sites(table: Path, column: str) -> int:
    """How many values the column has in the CSV file. Raises ValueError if there is no such file or column."""
    if not table.is_file():
        raise ValueError(f"data={table}: there is no such file")
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        if column not in header:
            raise ValueError(f"sites={column}: {table} has no such column{did_you_mean(column, header)}")
        at = header.index(column)
        return len({row[at].strip() for row in reader if len(row) > at})
