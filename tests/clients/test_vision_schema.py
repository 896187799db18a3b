"""Images to arrays: archives and files, every refusal, and what goes into bundles."""

import io
import json
import sys
import unicodedata
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedclaw.clients.vision_schema import VisionSchema
from fedclaw.errors import DataError
from fedclaw.learning.workload import FileFormat

GREY = "{shape: [1, 4, 6], labels: [cat, dog], mean: [0.5], std: [0.25]}"
COLOUR = "{shape: [3, 4, 6], labels: [cat, dog]}"
COLOUR_RESIZED = "{shape: [3, 4, 6], labels: [cat, dog], resize: true}"


def schema_of(text: str) -> VisionSchema:
    return VisionSchema.parse(text, "schema.yaml")


def archive(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_uint8_archive_is_scaled_and_standardised(tmp_path: Path) -> None:
    images = np.zeros((2, 4, 6), np.uint8)
    images[1] = 255
    table = schema_of(GREY).read_examples(archive(tmp_path / "a.npz", images=images, labels=np.array([1, 0])))
    assert table.inputs.shape == (2, 1, 4, 6)
    assert table.inputs.dtype == np.float32
    assert set(table.inputs[0].ravel()) == {-2.0}
    assert set(table.inputs[1].ravel()) == {2.0}
    assert table.targets.tolist() == [1, 0]


@pytest.mark.parametrize("labels", [np.array([1, 0], np.uint8), np.array(["dog", "cat"]), np.array([1, 0], np.int32)])
def test_labels_by_index_or_name(tmp_path: Path, labels: np.ndarray) -> None:
    path = archive(tmp_path / "a.npz", images=pixels(2, 4, 6), labels=labels)
    assert schema_of(GREY).read_examples(path).targets.tolist() == [1, 0]


def test_channels_first_and_last_are_the_same_images(tmp_path: Path) -> None:
    images = pixels(5, 3, 4, 6)
    first = schema_of(COLOUR).read_inputs(archive(tmp_path / "a.npz", images=images))
    last = schema_of(COLOUR).read_inputs(archive(tmp_path / "b.npz", images=images.transpose(0, 2, 3, 1)))
    assert np.array_equal(first, last)
    np.testing.assert_allclose(first, images / 255, atol=1e-6)


def test_where_both_orders_fit_channels_come_first(tmp_path: Path) -> None:
    images = pixels(2, 3, 3, 3)
    read = schema_of("{shape: [3, 3, 3], labels: [a, b]}").read_inputs(archive(tmp_path / "a.npz", images=images))
    np.testing.assert_allclose(read, images / 255, atol=1e-6)


def test_floating_point_pixels_are_taken_as_they_are(tmp_path: Path) -> None:
    images = np.linspace(0, 1, 24).reshape(1, 4, 6)
    read = schema_of(GREY).read_inputs(archive(tmp_path / "a.npz", images=images))
    np.testing.assert_allclose(read[0, 0], (images[0] - 0.5) / 0.25, atol=1e-6)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": pixels(1, 4, 6)}, "has no array 'images'; it has pictures"),
        ({"images": pixels(1, 4, 6)}, "has no array 'labels'"),
        ({"images": pixels(1, 6, 4), "labels": [0]}, "'images' has shape (1, 6, 4); expected (N, 1, 4, 6)"),
        ({"images": pixels(4, 6), "labels": [0]}, "'images' has shape (4, 6); expected (N, 1, 4, 6)"),
        ({"images": np.uint8(3), "labels": [0]}, "'images' is empty"),
        ({"images": pixels(0, 4, 6), "labels": []}, "'images' is empty"),
        ({"images": pixels(1, 4, 6).astype(int), "labels": [0]}, "'images' holds int64; expected uint8, or floating"),
        ({"images": pixels(1, 4, 6) * 1.0, "labels": [0]}, "row 1, array 'images': a pixel outside 0 to 1"),
        (
            {"images": np.array([np.zeros((4, 6)), np.full((4, 6), np.nan)]), "labels": [0, 0]},
            "row 2, array 'images': a pixel outside 0 to 1",
        ),
        ({"images": pixels(2, 4, 6), "labels": [0]}, "'labels' has shape (1,); expected (2,)"),
        ({"images": pixels(2, 4, 6), "labels": [0, 2]}, "row 2, array 'labels': '2'; expected 0 to 1 or one of 'cat'"),
        ({"images": pixels(2, 4, 6), "labels": [-1, 0]}, "row 1, array 'labels': '-1'; expected 0 to 1"),
        (
            {"images": pixels(1, 4, 6), "labels": np.array([2**64 - 1], np.uint64)},
            "row 1, array 'labels': '18446744073709551615'",
        ),
        ({"images": pixels(2, 4, 6), "labels": ["cat", "cow"]}, "row 2, array 'labels': 'cow'"),
        ({"images": pixels(1, 4, 6), "labels": [0.5]}, "'labels' holds float64; expected integers or text"),
    ],
)
def test_a_bad_archive(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = archive(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError) as caught:
        schema_of(GREY).read_examples(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_pickles_broken_archives_and_no_archive(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, images=np.array([Trap()], dtype=object), labels=[0])
    text = tmp_path / "text.npz"
    text.write_text("no archive")
    cut = archive(tmp_path / "cut.npz", images=pixels(9, 4, 6), labels=[0] * 9)
    cut.write_bytes(cut.read_bytes()[:-60])
    damaged = archive(tmp_path / "damaged.npz", images=pixels(9, 4, 6), labels=[0] * 9)
    content = bytearray(damaged.read_bytes())
    content[200] ^= 1
    damaged.write_bytes(content)
    squeezed = tmp_path / "squeezed.npz"
    np.savez_compressed(squeezed, images=pixels(99, 4, 6), labels=[0] * 99)
    content = bytearray(squeezed.read_bytes())
    content[300:400] = bytes(100)
    squeezed.write_bytes(content)
    raw, giant = tmp_path / "raw.npz", tmp_path / "giant.npz"
    with zipfile.ZipFile(raw, "w") as file:
        file.writestr("images.npy", b"no array")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**60, 4, 6)})
    with zipfile.ZipFile(giant, "w") as file:
        file.writestr("images.npy", header.getvalue())
    for path in (pickled, text, cut, damaged, squeezed, raw, giant):
        with pytest.raises(DataError, match=r"not a readable .npz archive of plain arrays"):
            schema_of(GREY).read_examples(path)
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(DataError, match=r"none.npz: no such file"):
        schema_of(GREY).read_examples(tmp_path / "none.npz")


def test_an_archive_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedclaw.clients.arrays.MAX_ARCHIVE_BYTES", 2**20)
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("images.npy", bytes(2**21))
    assert path.stat().st_size < 10_000
    with pytest.raises(DataError, match="would unpack to 2097152 bytes; at most 1048576"):
        schema_of(GREY).read_examples(path)


def folder(root: Path, layout: dict[str, Image.Image]) -> Path:
    for name, image in layout.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name)
    return root


def test_image_folder(tmp_path: Path) -> None:
    shades = {"dog/b.png": 200, "dog/a.PNG": 100, "cat/c.png": 0, "cat/.hidden.png": 9}
    root = folder(tmp_path / "train", {name: Image.new("L", (6, 4), shade) for name, shade in shades.items()})
    table = schema_of(GREY).read_examples(root)
    assert table.targets.tolist() == [0, 1, 1]
    found = table.inputs[:, 0, 0, 0] * 0.25 + 0.5
    np.testing.assert_allclose(found * 255, [0, 100, 200], atol=1e-3)
    assert np.array_equal(np.sort(schema_of(GREY).read_inputs(root), axis=0), np.sort(table.inputs, axis=0))
    assert schema_of(GREY).read_inputs(root / "dog").shape == (2, 1, 4, 6)


def test_a_file_and_an_archive_of_the_same_image_agree(tmp_path: Path) -> None:
    image = pixels(4, 6, 3)
    Image.fromarray(image).save(tmp_path / "a.png")
    from_file = schema_of(COLOUR).read_inputs(tmp_path / "a.png")
    assert np.array_equal(from_file, schema_of(COLOUR).read_inputs(archive(tmp_path / "a.npz", images=image[None])))


def test_grey_and_palette_images_become_colour(tmp_path: Path) -> None:
    grey = Image.fromarray(pixels(4, 6))
    grey.save(tmp_path / "l.png")
    read = schema_of(COLOUR).read_inputs(tmp_path / "l.png")[0]
    np.testing.assert_allclose(read, np.broadcast_to(np.asarray(grey) / 255, (3, 4, 6)), atol=1e-6)
    Image.new("P", (6, 4)).save(tmp_path / "p.png")
    assert schema_of(COLOUR).read_inputs(tmp_path / "p.png").shape == (1, 3, 4, 6)


def test_resizing_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    Image.new("RGB", (60, 40), (255, 0, 0)).save(path)
    with pytest.raises(DataError, match=r"large.jpg: 60 x 40 pixels; expected 6 x 4 \(or resize: true\)"):
        schema_of(COLOUR).read_inputs(path)
    read = schema_of(COLOUR_RESIZED).read_inputs(path)
    np.testing.assert_allclose(read[0].mean(axis=(1, 2)), [1, 0, 0], atol=0.02)


def test_a_decompression_bomb_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    Image.new("RGB", (300, 200)).save(path)
    for limit, message in ((50_000, "300 x 200 pixels; at most 50000 are decoded"), (100, "not a readable PNG")):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings(action="ignore"), pytest.raises(DataError, match=message):
            schema_of(COLOUR_RESIZED).read_inputs(path)


@pytest.mark.parametrize(
    ("mode", "schema", "message"),
    [
        ("RGB", GREY, r"pixel mode RGB; expected L \(1 channels\)"),
        ("RGBA", COLOUR, r"pixel mode RGBA; expected RGB \(3 channels\)"),
        ("I;16", GREY, "pixel mode I;16; expected L"),
        ("RGB", "{shape: [2, 4, 6], labels: [a, b]}", "image files have 1, 3 or 4 channels, the schema has 2"),
    ],
)
def test_nothing_is_dropped_from_an_image_unasked(tmp_path: Path, mode: str, schema: str, message: str) -> None:
    Image.new(mode, (6, 4)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=message):
        schema_of(schema).read_inputs(tmp_path / "a.png")


def test_one_transparent_colour_needs_a_channel_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("P", (6, 4)).save(path, transparency=0)
    with pytest.raises(DataError, match=r"pixel mode P with transparency; expected RGB \(3 channels\)"):
        schema_of(COLOUR).read_inputs(path)
    assert not schema_of("{shape: [4, 4, 6], labels: [a, b]}").read_inputs(path)[0, 3].any()


def test_bad_folders_and_files(tmp_path: Path) -> None:
    image = Image.new("L", (6, 4))
    schema = schema_of(GREY)
    with pytest.raises(DataError, match=r"'cow' is not a folder named after a label; the labels are 'cat', 'dog'"):
        schema.read_examples(folder(tmp_path / "one", {"cat/a.png": image, "cow/a.png": image}))
    with pytest.raises(DataError, match=r"'a.png' is not a folder named after a label"):
        schema.read_examples(folder(tmp_path / "two", {"cat/a.png": image, "a.png": image}))
    (tmp_path / "three" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"three: no .png, .jpg or .jpeg files"):
        schema.read_examples(tmp_path / "three")
    with pytest.raises(DataError, match=r"three: no .png, .jpg or .jpeg files"):
        schema.read_inputs(tmp_path / "three")
    (tmp_path / "three" / "cat" / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"notes.txt: expected only .png, .jpg and .jpeg files"):
        schema.read_examples(tmp_path / "three")
    with pytest.raises(DataError, match=r"none.png: no such file"):
        schema.read_inputs(tmp_path / "none.png")
    path = tmp_path / "cut.png"
    Image.fromarray(pixels(4, 6)).save(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cut.png: not a readable PNG or JPEG"):
        schema.read_inputs(path)
    image.save(tmp_path / "gif.png", format="GIF")
    with pytest.raises(DataError, match=r"gif.png: not a readable PNG or JPEG"):
        schema.read_inputs(tmp_path / "gif.png")


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"a.png: reading image files needs pillow: pip install 'fedclaw\[data\]'"):
        schema_of(GREY).read_inputs(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{shape: [1, 4], labels: [a, b]}", "shape: Tuple should have at least 3|shape.2: Field required"),
        ("{shape: [0, 4, 4], labels: [a, b]}", "shape.0: Input should be greater than or equal to 1"),
        ("{shape: [8000, 8000, 8000], labels: [a, b]}", "at most 67108864"),
        ("{shape: [1, 4, 4], labels: [a]}", "labels: expected 2 to 10000 of them, got 1"),
        ("{shape: [1, 4, 4], labels: [a, a]}", "labels: more than once: 'a'"),
        ("{shape: [3, 4, 4], labels: [a, b], mean: [0.5]}", "mean has 1 values; expected one for each of 3 channels"),
        ("{shape: [1, 4, 4], labels: [a, b], std: [0]}", "std.0: Input should be greater than 0"),
        ("{shape: [1, 4, 4], labels: [a, b], scale: 3}", "scale: Extra inputs are not permitted"),
    ],
)
def test_a_bad_schema_file(schema: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        schema_of(schema)
    assert str(caught.value).startswith("schema.yaml: ")


def test_json_is_canonical_and_read_back() -> None:
    schema = schema_of(GREY)
    assert schema_of(json.dumps(json.loads(schema.to_json()), indent=1)).to_json() == schema.to_json()
    assert schema_of(GREY.replace("0.25", "0.26")).to_json() != schema.to_json()
    assert schema.labels == ("cat", "dog")
    assert schema.input_shape == (1, 4, 6)


def test_the_description_has_every_constant() -> None:
    described = schema_of(GREY).describe_inputs()
    assert described["shape"] == ["batch", 1, 4, 6]
    assert (described["mean"], described["std"], described["resize"]) == ([0.5], [0.25], False)
    assert schema_of(COLOUR).describe_inputs()["std"] == [1, 1, 1]
    assert json.loads(json.dumps(described)) == described


def test_synthetic_images_are_smooth_and_within_range() -> None:
    schema = schema_of("{shape: [3, 32, 24], labels: [a, b], mean: [0.5, 0.4, 0.3], std: [0.5, 0.2, 0.1]}")
    made = schema.synthetic_inputs(50, np.random.default_rng(0))
    assert made.shape == (50, 3, 32, 24)
    assert made.dtype == np.float32
    raw = made * np.array([0.5, 0.2, 0.1])[:, None, None] + np.array([0.5, 0.4, 0.3])[:, None, None]
    np.testing.assert_allclose(raw.min(axis=(1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(raw.max(axis=(1, 2, 3)), 1, atol=1e-5)
    assert np.abs(np.diff(raw, axis=2)).mean() < 0.1
    assert np.array_equal(made, schema.synthetic_inputs(50, np.random.default_rng(0)))
    assert not np.array_equal(made[0], made[1])
    assert schema.synthetic_inputs(0, np.random.default_rng(0)).shape == (0, 3, 32, 24)
    tiny = schema_of("{shape: [1, 1, 1], labels: [a, b]}").synthetic_inputs(3, np.random.default_rng(0))
    assert np.isfinite(tiny).all()


def test_names_of_labels_are_compared_after_unicode_normalisation(tmp_path: Path) -> None:
    """Apple's file systems give names back decomposed."""
    labels = ("Kätzchen", "chien")
    schema = schema_of(f"{{shape: [1, 4, 6], labels: [{', '.join(labels)}]}}")
    decomposed = unicodedata.normalize("NFD", labels[0])
    assert decomposed != labels[0]
    root = folder(
        tmp_path / "train", {f"{decomposed}/a.png": Image.new("L", (6, 4)), "chien/b.png": Image.new("L", (6, 4))}
    )
    assert schema.read_examples(root).targets.tolist() == [0, 1]
    names = archive(tmp_path / "a.npz", images=pixels(2, 4, 6), labels=np.array(["chien", decomposed]))
    assert schema.read_examples(names).targets.tolist() == [1, 0]


def test_images_have_no_delimiter(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="files of the workload vision have no delimiter"):
        schema_of(GREY).written_as(FileFormat(delimiter=";"))
