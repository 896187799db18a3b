"""Pixels from .npz archives and image files. Pillow is needed for image files only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclaw.clients.definitions import shown
from fedclaw.clients.values import Declared
from fedclaw.errors import DataError
from fedclaw.learning.sources import MemoryFile, Source

Shape = tuple[int, int, int]
"""Channels, height, width."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's pixel mode for each number of channels that an image file can have."""
LOSSLESS = {"L": {"1", "L"}, "RGB": {"1", "L", "P", "RGB"}, "RGBA": {"1", "L", "P", "RGB", "RGBA"}}
"""Modes of a file that become the wanted one without loss."""


def pixels_of(path: Source, images: NDArray[Any], shape: Shape) -> NDArray[np.float32]:
    """Images (N, H, W), (N, K, H, W) or (N, H, W, K) as (N, K, H, W) float32 in [0, 1].

    uint8 is divided by 255; floating-point pixels must lie in [0, 1] already. Where K, H and W are such that
    both orders fit, channels come first. Raises DataError.
    """
    channels, height, width = shape
    if images.shape[1:] == (height, width) and channels == 1:
        images = images[:, None]
    elif images.shape[1:] == (height, width, channels) and images.shape[1:] != shape:
        images = np.moveaxis(images, 3, 1)
    if images.ndim != 4 or images.shape[1:] != shape:
        raise DataError(f"{path}: 'images' has shape {images.shape}; expected (N, {channels}, {height}, {width})")
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images, np.float32) / np.float32(255)
    if images.dtype.kind != "f":
        raise DataError(f"{path}: 'images' holds {images.dtype}; expected uint8, or floating point from 0 to 1")
    pixels = np.ascontiguousarray(images, np.float32)
    wrong = ~((pixels >= 0) & (pixels <= 1)).all(axis=(1, 2, 3))
    if wrong.any():
        row = int(np.argmax(wrong)) + 1
        raise DataError(f"{path}: row {row}, array 'images': a pixel outside 0 to 1; scale floating-point pixels first")
    return pixels


def targets_of(path: Path, values: NDArray[Any], count: int, labels: Sequence[str]) -> NDArray[np.int64]:
    """The array `labels` (N,), of class indices or of label names, as class indices. Raises DataError."""
    if values.shape != (count,):
        raise DataError(f"{path}: 'labels' has shape {values.shape}; expected ({count},), one for each image")
    if values.dtype.kind == "U":
        declared = Declared({label: i for i, label in enumerate(labels)})
        found = [declared.find(str(value)) for value in values]
        targets = np.array([-1 if code is None else code for code in found], np.int64)
    elif values.dtype.kind in "iu":
        # clipped before the cast, so that an unsigned giant does not wrap round to a valid class
        targets = np.where((values >= 0) & (values < len(labels)), values, -1).astype(np.int64)
    else:
        raise DataError(f"{path}: 'labels' holds {values.dtype}; expected integers or text")
    if (targets < 0).any():
        row = int(np.argmax(targets < 0))
        listed = ", ".join(map(repr, labels[:8])) + (" …" if len(labels) > 8 else "")
        raise DataError(
            f"{path}: row {row + 1}, array 'labels': {shown(values[row])}; "
            f"expected 0 to {len(labels) - 1} or one of {listed}"
        )
    return targets


def read_image(path: Path | MemoryFile, shape: Shape, *, resize: bool) -> NDArray[np.float32]:
    """One PNG or JPEG as (K, H, W) float32 in [0, 1]. Raises DataError.

    Grey and palette images become colour; colour is not made grey and transparency is not dropped unasked.
    An image of another size is an error unless `resize` (bilinear). Orientation tags of cameras are not followed.
    The size is checked before a pixel is decoded, and Pillow's limit on decompression bombs is an error.
    """
    image_module = _pillow(path)
    channels, height, width = shape
    if channels not in MODES:
        raise DataError(f"{path}: image files have 1, 3 or 4 channels, the schema has {channels}; use an .npz archive")
    limit = image_module.MAX_IMAGE_PIXELS
    try:
        with path.open("rb") as file, image_module.open(file, formats=("PNG", "JPEG")) as image:
            if limit is not None and image.width * image.height > limit:
                raise DataError(f"{path}: {image.width} x {image.height} pixels; at most {limit} are decoded")
            if image.size != (width, height) and not resize:
                raise DataError(
                    f"{path}: {image.width} x {image.height} pixels; expected {width} x {height} (or resize: true)"
                )
            wanted = MODES[channels]
            transparent = "transparency" in image.info
            if image.mode not in LOSSLESS[wanted] or (transparent and wanted != "RGBA"):
                kind = f"{image.mode} with transparency" if transparent else image.mode
                raise DataError(f"{path}: pixel mode {kind}; expected {wanted} ({channels} channels)")
            converted = image.convert(wanted)
            if image.size != (width, height):
                converted = converted.resize((width, height), image_module.Resampling.BILINEAR)
            pixels = np.asarray(converted, np.uint8).reshape(height, width, channels)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable PNG or JPEG: {error}") from error
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32) / np.float32(255)


def image_files(folder: Path, levels: int = 0) -> list[Path]:
    """The PNG and JPEG files in `folder`, by name; so many levels of folders below it.

    Raises DataError for any other file or folder but hidden ones.
    """
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    if levels:
        if odd := next((entry for entry in entries if not entry.is_dir()), None):
            raise DataError(f"{odd}: expected only folders in {folder}, as the schema's pattern of persons has it")
        return [file for entry in entries for file in image_files(entry, levels - 1)]
    for entry in entries:
        if not entry.is_file() or entry.suffix.lower() not in SUFFIXES:
            raise DataError(f"{entry}: expected only .png, .jpg and .jpeg files in {folder}")
    return entries


def _pillow(path: Path | MemoryFile) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"{path}: reading image files needs pillow: pip install 'fedclaw[data]', or use .npz"
        ) from error
    return Image
