"""Images: .npz archives or folders of PNG/JPEG, and the schema file that says what they are.

A schema file, which all sites of a federation share:

    shape: [1, 28, 28]            # channels, height, width
    labels: ["0", "1", "2"]       # names of the classes, in the order of the model's outputs
    mean: [0.5]                   # per channel, of pixels in [0, 1]; public constants, 0 if not stated
    std: [0.25]                   # per channel, 1 if not stated
    resize: false                 # true: image files of another size are scaled, not refused
    weights: {"2": 5}             # how much an example counts in the loss, 1 if not stated
    person: "{person}_*"          # whose an image is, by its file's path below the label's folder; see below
    rows_per_person: 1            # images of a person of which metrics are made

Pixels are brought to [0, 1] (uint8 divided by 255, floating point must be in [0, 1] already), then become
(pixel - mean) / std.

Names of labels are compared after Unicode normalisation: some systems write the names of folders in another form.

Labelled data is an .npz archive with the arrays `images` (N, H, W), (N, K, H, W) or (N, H, W, K) and `labels` (class
indices or label names), or a folder with a sub-directory of PNG/JPEG files for each label, read in the order
of the labels and then of the file names. Data to predict is an archive, one image file, or a folder of image
files (in the order of their names) or of such sub-directories. Rows in messages count images from 1.

Persons. With `person`, a guarantee is for each person, not for each image. In a folder it is a pattern of files' paths
below the folder of their label, with {person} for the person's identifier, to be as short as it can, and * for anything
but a slash: "{person}_*" fits p17_left.png, "{person}/*" fits p17/left.png. A person's images may be of several labels.
An archive has the array `persons` (N,) of text or whole numbers. Training uses all images, metrics a person's first
`rows_per_person`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, model_validator

from fedclaw.clients.arrays import PERSONS, persons_in, read_archive
from fedclaw.clients.definitions import Labels, Weights, canonical_json, parse_definition, shown, weights_of
from fedclaw.clients.images import Shape, image_files, pixels_of, read_image, targets_of
from fedclaw.clients.persons import USUAL_ROWS, FilePattern, RowsPerPerson, numbered, require_rows_of_persons
from fedclaw.clients.values import normal
from fedclaw.errors import DataError, NoExamples, NotInGraph
from fedclaw.learning.preprocessing import Columns, GraphWriter, PreparedInputs, Preprocessing, TypedColumn, TypedRows
from fedclaw.learning.sources import MemoryFile, MemoryTable, Source
from fedclaw.learning.workload import Floats, Rows, Schema, Table
from fedclaw.protocol.frozen import Written

MAX_SIDE = 8192
MAX_VALUES = 2**26
"""Values in one image, at most: 256 MiB as float32."""
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]


class ImageDefinition(Written):
    """The content of an image schema file."""

    shape: tuple[Side, Side, Side]
    labels: Labels
    mean: tuple[float, ...] | None = None
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    resize: bool = False
    weights: Weights | None = None
    """How much an example counts in the loss, by label; 1 if not stated."""
    person: Annotated[str, AfterValidator(FilePattern.checked)] | None = None
    """Pattern of the files' paths, with {person} once. None: a guarantee is for each image."""
    rows_per_person: RowsPerPerson | None = None
    """How many images of a person, its first ones, metrics use; 1 if not stated."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        weights_of(self.labels, self.weights)
        require_rows_of_persons(self.rows_per_person, self.person)
        channels, height, width = self.shape
        if channels * height * width > MAX_VALUES:
            raise ValueError(f"shape {list(self.shape)} is {channels * height * width} values; at most {MAX_VALUES}")
        for field, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != channels:
                raise ValueError(f"{field} has {len(values)} values; expected one for each of {channels} channels")
        return self


class VisionSchema(Schema):
    """Images to (N, K, H, W) float32."""

    name: ClassVar[str] = "vision"
    modality = "image"

    def __init__(self, definition: ImageDefinition) -> None:
        self.definition = definition
        channels = definition.shape[0]
        self._mean = np.array(definition.mean or (0.0,) * channels, np.float32)[:, None, None]
        self._std = np.array(definition.std or (1.0,) * channels, np.float32)[:, None, None]
        self._pattern = None if definition.person is None else FilePattern(definition.person)

    @classmethod
    def parse(cls, text: str, origin: str) -> Self:
        """Read a schema file. Raises DataError that names `origin` and the field."""
        return cls(parse_definition(text, origin, ImageDefinition))

    def to_json(self) -> str:
        """Canonical JSON of the schema."""
        return canonical_json(self.definition)

    @property
    def input_shape(self) -> Shape:
        """(K, H, W)."""
        return self.definition.shape

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.definition.labels

    @property
    def class_weights(self) -> tuple[float, ...] | None:
        """As the schema file states them."""
        return weights_of(self.labels, self.definition.weights)

    @property
    def rows_per_person(self) -> int | None:
        """See Schema."""
        return None if self._pattern is None else self.definition.rows_per_person or USUAL_ROWS

    def read_examples(self, path: Path) -> Table:
        """Read an archive with labels, or a folder with a sub-directory for each label. Raises DataError."""
        if path.is_dir():
            files, targets, persons = self._labelled_files(path)
            table = Table(self._standardised(self._read_files(path, files)), np.array(targets, np.int64))
            return table if self._pattern is None else table.owned_by(*numbered(persons))
        arrays = read_archive(path, "images", "labels", PERSONS)
        if "labels" not in arrays:
            raise DataError(f"{path}: has no array 'labels'")
        inputs = self._standardised(self._archive_pixels(path, arrays["images"]))
        table = Table(inputs, targets_of(path, arrays["labels"], len(inputs), self.labels))
        return table if self._pattern is None else table.owned_by(*persons_in(path, arrays, len(table)))

    def read_inputs(self, path: Path) -> Floats:
        """Read an archive, an image file or a folder; labels are not looked at. Raises DataError."""
        return self._standardised(self._pixels(path))

    def read_rows(self, path: Source, identifiers: Sequence[str] = ()) -> Rows:
        """What `read_inputs` reads; of a folder, an image that cannot be read is refused alone, and files are named."""
        rows = self.pixel_rows(path, identifiers)
        return replace(rows, inputs=self._standardised(rows.inputs))

    def pixel_rows(self, path: Source, identifiers: Sequence[str] = ()) -> Rows:
        """The same, pixels in [0, 1] that are not standardised. Raises DataError."""
        if identifiers:
            raise DataError(f"{path}: images have no columns, so there is no {shown(identifiers[0])}")
        if isinstance(path, MemoryTable):
            raise DataError(f"{path}: an image or an .npz archive is needed")
        if not isinstance(path, Path) or not path.is_dir():
            return Rows(self._pixels(path), {}, {})
        files, refused = list(_all_images(path, self._levels)), dict[int, str]()
        pixels = np.zeros((len(files), *self.definition.shape), np.float32)
        for row, file in enumerate(files):
            try:
                pixels[row] = read_image(file, self.definition.shape, resize=self.definition.resize)
            except DataError as error:
                refused[row] = str(error)
        names = [file.relative_to(path).as_posix() for file in files]
        return Rows(pixels, refused, {"file": names})

    @property
    def constants(self) -> tuple[Floats, Floats]:
        """Mean and standard deviation of each channel, (K, 1, 1) each."""
        return self._mean, self._std

    def preprocessing(self) -> "ImagePreprocessing":
        """See Schema."""
        return ImagePreprocessing(self)

    def describe_inputs(self) -> Mapping[str, Any]:
        """The input tensor, its layout and the constants."""
        return {
            "dtype": "float32",
            "shape": ["batch", *self.definition.shape],
            "layout": "batch, channel, height, width",
            "mean": self._mean.ravel().tolist(),
            "std": self._std.ravel().tolist(),
            "resize": self.definition.resize,
            "encoding": "pixels in [0, 1] (uint8 divided by 255), then (pixel - mean) / std for each channel",
        }

    def synthetic_inputs(self, count: int, generator: np.random.Generator) -> Floats:
        """Smooth random images, standardised like any other."""
        return self._standardised(self.synthetic_pixels(count, generator))

    def synthetic_pixels(self, count: int, generator: np.random.Generator) -> Floats:
        """(count, K, H, W): uniform noise on a coarse grid of 2 to 8 cells a side, drawn bilinearly to full size.

        Each image is stretched to the whole range [0, 1].
        """
        channels, height, width = self.definition.shape
        pixels = np.empty((count, channels, height, width), np.float32)
        cells = generator.integers(2, 9, count)
        for size in np.unique(cells):
            chosen = np.flatnonzero(cells == size)
            coarse = generator.random((len(chosen), channels, size, size))
            pixels[chosen] = _bilinear(height, int(size)) @ coarse @ _bilinear(width, int(size)).T
        low = pixels.min(axis=(1, 2, 3), keepdims=True, initial=1.0)
        high = pixels.max(axis=(1, 2, 3), keepdims=True, initial=0.0)
        stretched: Floats = (pixels - low) / np.maximum(high - low, np.float32(1e-6))
        return stretched

    def _standardised(self, pixels: Floats) -> Floats:
        return (pixels - self._mean) / self._std

    def _pixels(self, path: Path | MemoryFile) -> Floats:
        """An archive, an image file or a folder, in [0, 1]. Raises DataError."""
        if isinstance(path, Path) and path.is_dir():
            return self._read_files(path, list(_all_images(path, self._levels)))
        if path.suffix.lower() == ".npz":
            return self._archive_pixels(path, read_archive(path, "images")["images"])
        return self._read_files(path, [path])

    def _archive_pixels(self, path: Source, images: Any) -> Floats:
        if not len(images.shape) or not images.shape[0]:
            raise NoExamples(f"{path}: 'images' is empty")
        return pixels_of(path, images, self.definition.shape)

    def _read_files(self, path: Source, files: Sequence[Path | MemoryFile]) -> Floats:
        if not files:
            raise NoExamples(f"{path}: no .png, .jpg or .jpeg files")
        pixels = np.empty((len(files), *self.definition.shape), np.float32)
        for row, file in enumerate(files):
            pixels[row] = read_image(file, self.definition.shape, resize=self.definition.resize)
        return pixels

    def _labelled_files(self, path: Path) -> tuple[list[Path], list[int], list[str]]:
        """Files, label and person of each; no persons without a pattern. Raises DataError."""
        folders = {normal(entry.name): entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")}
        labels = set(map(normal, self.labels))
        for name, entry in folders.items():
            if not entry.is_dir() or name not in labels:
                listed = ", ".join(map(repr, self.labels[:8]))
                raise DataError(f"{path}: {shown(name)} is not a folder named after a label; the labels are {listed}")
        files, targets, persons = list[Path](), list[int](), list[str]()
        for index, label in enumerate(self.labels):
            folder = folders.get(normal(label))
            found = [] if folder is None else image_files(folder, self._levels)
            files += found
            targets += [index] * len(found)
            if folder is not None and self._pattern is not None:
                persons += [self._pattern.person(file, folder) for file in found]
        return files, targets, persons

    @property
    def _levels(self) -> int:
        """Folders between that of a label and its files."""
        return 0 if self._pattern is None else self._pattern.levels


IMAGES = "images"
LEVELS = 255
HALF_A_STEP = 1e-3
"""How far, in steps of 1/255, a floating-point pixel may be off one of 8 bits."""


class ImagePreprocessing(Preprocessing):
    """Pixels of 8 bits, height, width, channels as image libraries decode them, to standardised channels first."""

    outside = (
        "PNG and JPEG are decoded before, palette and grey images made colour where the schema has three channels, and "
        "images brought to the schema's height and width: the graph takes no other size",
        "pixels are whole numbers from 0 to 255; floating-point images in [0, 1] are prepared by FedClaw's reader and "
        "go to model.onnx",
        "FedClaw's reader does all that: python -m fedclaw.predict, or Predictor.read_columns for the pixels alone",
    )

    def __init__(self, schema: VisionSchema) -> None:
        self._schema = schema
        channels, height, width = schema.input_shape
        self.columns = (
            TypedColumn(
                name=IMAGES,
                column=IMAGES,
                dtype="uint8",
                shape=("batch", height, width, channels),
                meaning="pixels from 0 to 255, rows from the top, channels last (grey, or red, green, blue and alpha)",
            ),
        )

    def write(self, graph: GraphWriter) -> PreparedInputs:
        """See Preprocessing. No image of the right shape is refused."""
        pixels = graph.add("Cast", graph.add("Transpose", IMAGES, perm=[0, 3, 1, 2]), to=np.float32)
        scaled = graph.add("Div", pixels, graph.constant(np.array(LEVELS, np.float32)))
        mean, std = (graph.constant(value[None]) for value in self._schema.constants)
        inputs = graph.add("Div", graph.add("Sub", scaled, mean), std)
        highest = graph.add("ReduceMax", pixels, graph.constant(np.array([1, 2, 3])), keepdims=0)
        below = graph.add("Less", highest, graph.constant(np.array(0, np.float32)))
        return PreparedInputs(inputs, graph.add("Unsqueeze", below, graph.constant(np.array([1]))))

    def read(self, path: Source, identifiers: Sequence[str] = ()) -> TypedRows:
        """See Preprocessing. Raises NotInGraph for floating-point pixels between two of 8 bits."""
        rows = self._schema.pixel_rows(path, identifiers)
        steps = rows.inputs * np.float32(LEVELS)
        pixels = np.rint(steps)
        if len(steps) and np.abs(steps - pixels).max() > HALF_A_STEP:
            raise NotInGraph(f"{path}: floating-point pixels that 8 bits cannot hold; {self.outside[1]}")
        return TypedRows({IMAGES: np.moveaxis(pixels.astype(np.uint8), 1, 3)}, rows.refused, rows.identifiers)

    def prepare(self, columns: Columns) -> tuple[Floats, NDArray[np.bool_]]:
        """See Preprocessing."""
        pixels = pixels_of(Path(IMAGES), np.moveaxis(columns[IMAGES], 3, 1), self._schema.input_shape)
        mean, std = self._schema.constants
        return (pixels - mean) / std, np.zeros(len(pixels), np.bool_)

    def synthetic(self, count: int, generator: np.random.Generator) -> Columns:
        """See Preprocessing."""
        pixels = np.rint(self._schema.synthetic_pixels(count, generator) * LEVELS).astype(np.uint8)
        return {IMAGES: np.ascontiguousarray(np.moveaxis(pixels, 1, 3))}


def _all_images(folder: Path, levels: int) -> Iterator[Path]:
    """The images of `folder`, or of its sub-directories if it has some, and of so many levels of theirs."""
    folders = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    if not folders:
        yield from image_files(folder)
    for entry in folders:
        if levels:
            yield from _all_images(entry, levels - 1)
        else:
            yield from image_files(entry)


def _bilinear(size: int, cells: int) -> Floats:
    """(size, cells) weights that draw `cells` values out to `size` by linear interpolation, rows adding up to 1."""
    place = np.linspace(0, cells - 1, size)
    weights: Floats = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(cells))).astype(np.float32)
    return weights
