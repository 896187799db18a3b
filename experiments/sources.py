"""Where experiments' examples come from: data sets that ship with scikit-learn, and images that are made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from experiments.synthetic_images import SyntheticImages, make_images
from fedclaw.frozen import Frozen
from fedclaw.workload import Floats


class DatasetSettings(Frozen):
    """conf/dataset/*.yaml."""

    name: Literal["breast_cancer", "digits", "synthetic_images"]
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

    @property
    def workload(self) -> str:
        """The workload whose data this is: tabular or vision."""
        return "tabular" if self.name == "breast_cancer" else "vision"

    @model_validator(mode="after")
    def _synthetic_has_its_settings(self) -> Self:
        if self.synthetic is not None and self.name != "synthetic_images":
            raise ValueError(f"synthetic is for dataset=synthetic_images, not for {self.name}")
        return self


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


def load_source(settings: DatasetSettings) -> Source:
    """The whole data set, not yet dealt."""
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
    return {"columns": columns, "target": {"name": "diagnosis", "labels": list(source.labels)}}


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
