"""ImageStream: all sources of images, unreadable files, shards and resuming, identity, prefetching."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from vit_probe import InputError, Preprocessing
from vit_probe.data import stream
from vit_probe.data.image_files import find_images, read_image
from vit_probe.data.stream import ImageStream

PREPROCESSING = Preprocessing(size=(16, 24), resize=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("vit_probe")] == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven photographs as JPEG files, which have no checksums, two of them in a subfolder."""
    random = np.random.default_rng(0)
    (tmp_path / "below").mkdir()
    for index in range(7):
        pixels = random.integers(0, 256, (40 + index, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / ("below" if index > 4 else ".") / f"{index}.jpg", quality=95)
    return tmp_path


@pytest.fixture
def paths(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.jpg"), key=lambda path: path.name)


@pytest.fixture
def expected(paths: list[Path]) -> Tensor:
    return torch.stack([PREPROCESSING(read_image(path)) for path in paths])


def hashed(images: Iterable[bytes]) -> str:
    """The combined hash of the images, as in the provenance."""
    return hashlib.sha256("".join(hashlib.sha256(image).hexdigest() for image in images).encode()).hexdigest()


def collect(batches: Iterable[Any], into: list[Any]) -> None:
    """Append `batches` one by one, so that those before an exception are kept."""
    for batch in batches:
        into.append(batch)


def truncate(path: Path) -> None:
    """Truncate a file in a way that its header does not show."""
    path.write_bytes(path.read_bytes()[:1500])


class MapStyle(Dataset[Any]):
    """A map-style dataset of torch that records which items were read; an exception among its items is raised."""

    def __init__(self, items: list[Any]) -> None:
        self.items, self.read = items, list[int]()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        if isinstance(item := self.items[index], Exception):
            raise item
        return item


class IterableStyle(IterableDataset[Any]):
    """An iterable-style dataset of torch."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class HuggingFace:
    """The interface of `datasets.Dataset`: rows are dictionaries."""

    def __init__(self, items: list[Any], key: str = "image") -> None:
        self.rows = [{"label": 1, key: item} for item in items]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


class HuggingFaceStreamed:
    """The interface of `datasets.IterableDataset`."""

    def __init__(self, items: list[Any]) -> None:
        self.rows = [{"image": item} for item in items]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def _files(paths: list[Path]) -> list[dict[str, Any]]:
    """Items of a Hugging Face dataset with `Image(decode=False)`: bytes, a path, or both."""
    data = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    return [*data[:2], {"bytes": data[2]["bytes"], "path": None}, *({"bytes": None, "path": str(path)} for path in paths[3:])]


PHOTOGRAPHS: dict[str, Callable[[Path, list[Path]], Any]] = {
    "patterns": lambda folder, paths: [folder / "[0-4].jpg", str(folder / "*" / "*.jpg")],
    "pattern": lambda folder, paths: f"{folder}/**/*.jpg",
    "files and folders": lambda folder, paths: [*map(str, paths[:5]), folder / "below"],
    "files and photographs": lambda folder, paths: [*paths[:5], *map(read_image, paths[5:])],
    "generator of files": lambda folder, paths: iter(paths),
    "generator of photographs": lambda folder, paths: map(read_image, paths),
    "labelled files": lambda folder, paths: [(path, 3) for path in paths],
    "dataset of photographs": lambda folder, paths: MapStyle([read_image(path) for path in paths]),
    "labelled dataset": lambda folder, paths: MapStyle([(Image.open(path), 3) for path in paths]),
    "dataset of files": lambda folder, paths: MapStyle(list(paths)),
    "iterable dataset": lambda folder, paths: IterableStyle([(read_image(path), 3) for path in paths]),
    "Hugging Face": lambda folder, paths: HuggingFace([read_image(path) for path in paths]),
    "Hugging Face, img": lambda folder, paths: HuggingFace([read_image(path) for path in paths], key="img"),
    "Hugging Face, streamed": lambda folder, paths: HuggingFaceStreamed([read_image(path) for path in paths]),
    "Hugging Face, not decoded": lambda folder, paths: HuggingFace(_files(paths)),
}
TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "dataset": lambda x: MapStyle(list(x)),
    "labelled dataset": lambda x: TensorDataset(x, torch.arange(len(x))),
    "dataset of batches": lambda x: MapStyle(list(x.split(3))),
    "list": list,
    "iterable dataset": lambda x: IterableStyle(list(x)),
    "generator": lambda x: iter(x),
    "batches": lambda x: list(x.split([1, 4, 2])),
    "loader": lambda x: DataLoader(TensorDataset(x), batch_size=3),
    "loader of dictionaries": lambda x: DataLoader([{"pixel_values": image} for image in x], batch_size=2),  # type: ignore[arg-type]
    "double precision": lambda x: list(x.double()),
}


class TestSources:
    @pytest.mark.parametrize("kind", PHOTOGRAPHS)
    def test_photographs(self, kind: str, folder: Path, paths: list[Path], expected: Tensor) -> None:
        images = ImageStream(PHOTOGRAPHS[kind](folder, paths), PREPROCESSING, batch_size=3)
        batches = list(images)
        assert [len(batch) for batch in batches] == [3, 3, 1]
        torch.testing.assert_close(torch.cat(batches), expected, rtol=0, atol=0)
        provenance = images.provenance()
        assert provenance["sha256"] == hashed(read_image(path).tobytes() for path in paths)
        assert (provenance["count"], provenance["skipped"], images.indices) == (7, {}, list(range(7)))

    @pytest.mark.parametrize("kind", TENSORS)
    def test_tensors(self, kind: str, expected: Tensor) -> None:
        images = ImageStream(TENSORS[kind](expected), None, batch_size=3)
        assert images.image_size == (16, 24)
        batches = torch.cat(list(images))
        torch.testing.assert_close(batches.float(), expected, rtol=0, atol=0)
        assert images.provenance()["sha256"] == hashed(image.numpy().tobytes() for image in batches)
        assert images.names == [f"image {index}" for index in range(7)]

    def test_names_are_those_of_the_files(self, paths: list[Path]) -> None:
        names = [path.name for path in paths]
        for images in (paths, HuggingFace(_files(paths))):
            opened = ImageStream(images, PREPROCESSING)
            list(opened)
            assert opened.names == [*names[:2], opened.names[2], *names[3:]]
            assert opened.count == 7

    @pytest.mark.parametrize("kind", ["list", "dataset", "batches", "loader", "iterable dataset"])
    def test_a_second_iteration_is_the_same(self, kind: str, expected: Tensor) -> None:
        images = ImageStream(TENSORS[kind](expected), None)
        for _ in range(2):
            torch.testing.assert_close(torch.cat(list(images)), expected)
            assert len(images.names) == 7

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            ({"train": [], "test": []}, r"images are a dict with keys \['test', 'train'\]; pass one of its values"),
            ({"a.jpg"}, "images are a set, which has no order; pass a list"),
            ("nowhere.jpg", "there is no image file or folder nowhere.jpg"),
            (["nowhere.jpg"], "there is no image file nowhere.jpg"),
            ("nowhere/**/*.jpg", r"the pattern nowhere/\*\*/\*.jpg matches no image files"),
            (["nowhere/?.jpg"], r"the pattern nowhere/\?.jpg matches no image files"),
            (MapStyle([]), "there are no images; pass at least one"),
            (HuggingFace([3]), r"must be a PIL image, a path or a tensor \(channel, height, width\), got int; a batch must be"),
            (
                MapStyle([{"picture": 3}]),
                r"a dictionary with keys \['picture'\]; its image must be under one of 'image', 'img', ",
            ),
            (MapStyle([torch.ones(3, 8, 8, dtype=torch.uint8)]), r"must be floating point, preprocessed .*, got torch.uint8"),
            (MapStyle([np.ones((8, 8, 3))]), r"got ndarray of shape \(8, 8, 3\)"),
            (MapStyle([OSError("gone"), OSError("gone too")]), r"MapStyle cannot read any of its 2 images; the last: gone too"),
        ],
    )
    def test_unsupported_images_raise(self, images: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            ImageStream(images, PREPROCESSING)

    def test_tensors_of_different_sizes_raise(self) -> None:
        images = ImageStream(MapStyle([torch.rand(3, 8, 8), torch.rand(3, 8, 16)]), None)
        with pytest.raises(InputError, match="got 8 x 16 pixels after 8 x 8; resize them, or measure one size at a time"):
            list(images)

    def test_a_pattern_ignores_files_that_are_not_images(self, folder: Path) -> None:
        (folder / "notes.txt").write_text("no image")
        assert [path.name for path in find_images([f"{folder}/*"])] == [f"{index}.jpg" for index in range(5)]

    def test_a_file_whose_name_looks_like_a_pattern(self, folder: Path) -> None:
        (folder / "0.jpg").rename(folder / "[1].jpg")
        assert find_images([f"{folder}/[1].jpg"]) == [folder / "[1].jpg"]


class TestUnreadable:
    def test_what_only_decoding_shows_raises_when_the_image_is_reached(self, paths: list[Path]) -> None:
        truncate(paths[4])
        images, batches = ImageStream(paths, PREPROCESSING, batch_size=2), list[Tensor]()
        with pytest.raises(InputError, match=r"4.jpg cannot be decoded .* may be truncated"):
            collect(images, batches)
        assert [len(batch) for batch in batches] == [2, 2]
        assert images.names == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]

    def test_the_check_at_the_start_reads_headers_and_decodes_nothing(
        self, paths: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(stream, "read_image", None)
            patched.setattr("vit_probe.data.image_files.read_image", None)
            ImageStream(paths, PREPROCESSING)
        paths[5].write_text("no image")
        with pytest.raises(InputError, match=r"5.jpg is not a readable image file"):
            ImageStream(paths, PREPROCESSING)
        ImageStream(paths, PREPROCESSING, start=6)
        ImageStream(paths, PREPROCESSING, shard=(0, 2))

    def test_each_file_is_decoded_once(self, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        decoded: list[Path] = []
        monkeypatch.setattr(stream, "read_image", lambda path: decoded.append(path) or read_image(path))
        list(ImageStream(paths, PREPROCESSING, batch_size=2))
        assert sorted(decoded) == sorted(paths)

    def test_a_truncated_file_that_still_decodes_is_used(self, tmp_path: Path) -> None:
        Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
        (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-12])
        assert len(torch.cat(list(ImageStream(tmp_path, PREPROCESSING)))) == 1

    def test_values_of_unknown_range_raise_at_the_start(self, tmp_path: Path) -> None:
        Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(tmp_path / "odd.tif")
        with pytest.raises(InputError, match=r"odd.tif holds 32-bit values"):
            ImageStream(tmp_path, PREPROCESSING)

    @pytest.mark.parametrize("batch_size", [1, 2, 7])
    def test_skip(self, batch_size: int, paths: list[Path], expected: Tensor) -> None:
        truncate(paths[0])
        paths[3].write_text("no image")
        paths[6].unlink()
        images = ImageStream(paths, PREPROCESSING, batch_size=batch_size, on_error="skip")
        batches = list(images)
        assert [len(batch) for batch in batches] == {1: [1, 1, 1, 1], 2: [2, 2], 7: [4]}[batch_size]
        torch.testing.assert_close(torch.cat(batches), expected[[1, 2, 4, 5]], rtol=0, atol=0)
        assert [name for name, _ in images.skipped] == ["0.jpg", "3.jpg", "6.jpg"]
        assert (images.count, images.indices, images.position) == (7, [1, 2, 4, 5], 7)
        provenance = images.provenance()
        assert provenance["names"] == ["1.jpg", "2.jpg", "4.jpg", "5.jpg"]
        assert "may be truncated" in provenance["skipped"]["0.jpg"]
        assert provenance["skipped"]["3.jpg"].endswith("3.jpg is not a readable image file")
        assert provenance["skipped"]["6.jpg"].startswith("there is no image file")
        readable = ImageStream([paths[index] for index in (1, 2, 4, 5)], PREPROCESSING)
        list(readable)
        assert provenance["sha256"] == readable.provenance()["sha256"]

    def test_skipped_files_of_the_same_name_are_all_listed(self, folder: Path) -> None:
        for name in ("a", "b"):
            (folder / name).mkdir()
            (folder / name / "same.jpg").write_text(name)
        images = ImageStream(folder, PREPROCESSING, on_error="skip")
        list(images)
        assert list(images.provenance()["skipped"]) == ["same.jpg", "same.jpg (2)"]

    @pytest.mark.parametrize("broken", [OSError("disk on fire"), None])
    def test_images_that_a_dataset_cannot_read(self, broken: Exception | None, expected: Tensor) -> None:
        items = [broken, *expected[:2], broken] if broken else [*expected[:2], None]
        reason = r"MapStyle cannot read its image 0 \(disk on fire\)" if broken else "image 2 is None"
        with pytest.raises(InputError, match=reason):
            list(ImageStream(MapStyle(items), None))
        images = ImageStream(MapStyle(items), None, on_error="skip")
        torch.testing.assert_close(torch.cat(list(images)), expected[:2])
        assert len(images.skipped) == len(items) - 2

    def test_photographs_that_are_opened_but_not_loaded(self, paths: list[Path]) -> None:
        truncate(paths[1])
        images = ImageStream([Image.open(path) for path in paths], PREPROCESSING, on_error="skip")
        assert len(torch.cat(list(images))) == 6
        assert [name for name, _ in images.skipped] == ["image 1"]
        with pytest.raises(InputError, match="image 1 cannot be decoded"):
            list(ImageStream([Image.open(path) for path in paths], PREPROCESSING))

    def test_other_exceptions_of_a_dataset_are_not_skipped(self, expected: Tensor) -> None:
        images = ImageStream(MapStyle([*expected[:2], RuntimeError("a bug")]), None, batch_size=1, on_error="skip")
        with pytest.raises(RuntimeError, match="a bug"):
            list(images)
        assert len(images.names) == 2

    def test_all_images_unreadable(self, paths: list[Path]) -> None:
        for path in paths:
            truncate(path)
        images = ImageStream(paths, PREPROCESSING, on_error="skip")
        with pytest.raises(InputError, match=r"none of the 7 images can be read; the first, 0.jpg: .*0.jpg cannot be dec"):
            list(images)

    def test_on_error_is_stop_or_skip(self) -> None:
        with pytest.raises(InputError, match="on_error must be 'stop' or 'skip', got 'ignore'"):
            ImageStream(torch.rand(1, 3, 8, 8), None, on_error="ignore")  # type: ignore[arg-type]


ALL = [*(f"photographs: {kind}" for kind in PHOTOGRAPHS), *TENSORS]


def make_source(kind: str, folder: Path, paths: list[Path], expected: Tensor) -> Any:
    """Images of a kind in one of the two tables above."""
    photographs = PHOTOGRAPHS.get(kind.removeprefix("photographs: ")) if kind.startswith("photo") else None
    return photographs(folder, paths) if photographs else TENSORS[kind](expected)


class TestShards:
    @pytest.mark.parametrize("kind", ALL)
    def test_start_and_shard(self, kind: str, folder: Path, paths: list[Path], expected: Tensor) -> None:
        for start in (0, 1, 4, 6, 7):
            for processes in (1, 2, 3):
                images_by_index: dict[int, Tensor] = {}
                for rank in range(processes):
                    options = dict(start=start, shard=(rank, processes))
                    images = ImageStream(make_source(kind, folder, paths, expected), PREPROCESSING, batch_size=2, **options)
                    shard_indices = [index for index in range(start, 7) if index % processes == rank]
                    batches = list(images)
                    assert all(map(len, batches))
                    assert images.indices == shard_indices
                    assert images.count in (len(shard_indices), None)
                    assert len(images.names) == len(shard_indices)
                    assert images.position == (shard_indices[-1] + 1 if shard_indices else start)
                    images_by_index |= dict(zip(shard_indices, torch.cat(batches) if batches else [], strict=True))
                assert sorted(images_by_index) == list(range(start, 7))
                for index, image in images_by_index.items():
                    torch.testing.assert_close(image.float(), expected[index], rtol=0, atol=0)

    def test_another_stream_continues_from_the_position(self, paths: list[Path], expected: Tensor) -> None:
        truncate(paths[2])
        images = ImageStream(paths, PREPROCESSING, batch_size=2, on_error="skip")
        for batch in images:
            first = batch
            if len(images.names) == 4:
                break
        rest = torch.cat(list(ImageStream(paths, PREPROCESSING, start=images.position, on_error="skip")))
        torch.testing.assert_close(first, expected[[3, 4]])
        torch.testing.assert_close(rest, expected[5:])

    def test_images_before_the_start_are_not_read(self, expected: Tensor) -> None:
        dataset = MapStyle(list(expected))
        images = ImageStream(dataset, None, start=4)
        dataset.read.clear()
        list(images)
        assert dataset.read == [4, 5, 6]

    def test_a_part_with_unreadable_images_only_is_no_error(self, paths: list[Path]) -> None:
        truncate(paths[6])
        images = ImageStream(paths, PREPROCESSING, on_error="skip", start=6)
        assert list(images) == []
        assert images.position == 7

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"start": -1}, "start must be at least 0, got -1"),
            ({"start": 8}, "start is 8, but there are only 7 images"),
            ({"shard": (2, 2)}, r"shard must be \(rank, processes\) with 0 <= rank < processes, got \(2, 2\)"),
            ({"shard": (-1, 2)}, r"got \(-1, 2\)"),
            ({"shard": (0, 0)}, r"got \(0, 0\)"),
        ],
    )
    def test_invalid_start_or_shard(self, options: dict[str, Any], message: str, expected: Tensor) -> None:
        with pytest.raises(InputError, match=message):
            ImageStream(expected, None, **options)


class TestValues:
    """Tensors that cannot be images raise errors that say what arrived."""

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    def test_not_finite(self, value: float, dtype: torch.dtype) -> None:
        images = torch.rand(5, 3, 8, 8).to(dtype)
        images[3, 1, 2, 2] = value
        for source in (images, list(images), DataLoader(TensorDataset(images), batch_size=2)):
            with pytest.raises(InputError, match=r"^image 3 holds NaN or infinite values$"):
                list(ImageStream(source, None, batch_size=2))
        skipping = ImageStream(list(images), None, on_error="skip")
        assert len(torch.cat(list(skipping))) == 4
        assert skipping.skipped == [("image 3", "image 3 holds NaN or infinite values")]

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (torch.zeros(2, 3, 8, 8, dtype=torch.complex64), "must be floating point, .* got torch.complex64"),
            (torch.zeros(2, 3, 8, 8, dtype=torch.bool), "must be floating point, .* got torch.bool"),
            (torch.zeros(2, 3, 8, 8, device="meta"), "must be dense and hold values, got one that is on the meta device"),
            (torch.zeros(2, 3, 8, 8).to_sparse(), "must be dense and hold values, got one that is torch.sparse_coo"),
            (torch.zeros(2, 3, 0, 8), r"must have pixels, got one of shape \(2, 3, 0, 8\)"),
            ([torch.zeros(0, 8, 8)], r"must have pixels, got one of shape \(0, 8, 8\)"),
            (
                torch.zeros(2, 3, 4, 8, 8),
                r"must have shape \(batch, channel, height, width\), got Tensor of shape \(2, 3, 4, 8, 8\)",
            ),
            (iter([[torch.zeros(3, 8, 8)] * 4]), "an item is a list of 4 images; a batch must be a tensor"),
            (iter([[Image.new("RGB", (8, 8))] * 2]), "an item is a list of 2 images; .* and an image with its target a tuple"),
            (
                [{"pixel_values": torch.zeros(2, 3, 8, 8), "pixel_mask": torch.arange(128).view(2, 8, 8) > 0}],
                r"images are padded \(pixel_mask is not 1 everywhere\); pass images of one size, without padding",
            ),
        ],
    )
    def test_unsupported(self, images: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            ImageStream(images, PREPROCESSING)

    def test_a_loader_that_cannot_make_batches(self, paths: list[Path], expected: Tensor) -> None:
        message = r"cannot be put into batches \(default_collate: .*PIL.*\); pass the dataset itself"
        with pytest.raises(InputError, match=message):
            ImageStream(DataLoader(MapStyle([read_image(path) for path in paths])), PREPROCESSING)
        sizes = MapStyle([*expected[:3], expected[3, :, :8]])
        with pytest.raises(InputError, match=r"cannot be put into batches \(stack expects each tensor to be equal size"):
            list(ImageStream(DataLoader(sizes, batch_size=2), None))
        with pytest.raises(InputError, match="an item is a list of 2 images; a batch must be a tensor"):
            ImageStream(DataLoader(MapStyle([str(path) for path in paths]), batch_size=2), PREPROCESSING)
        with pytest.raises(RuntimeError, match="a bug"):
            list(ImageStream(DataLoader(MapStyle([expected[0], RuntimeError("a bug")])), None))

    def test_a_full_mask_and_a_pair_of_images_are_accepted(self, expected: Tensor) -> None:
        masked = [{"pixel_values": expected, "pixel_mask": torch.ones(7, 16, 24)}]
        pairs = [(image, -image) for image in expected]
        for source in (masked, pairs, DataLoader(pairs, batch_size=2)):  # type: ignore[arg-type]
            torch.testing.assert_close(torch.cat(list(ImageStream(source, None))), expected)

    @pytest.mark.parametrize("batched", [True, False])
    def test_other_channels_than_before(self, batched: bool) -> None:
        images = [torch.rand(3, 8, 8), torch.rand(1, 8, 8)]
        with pytest.raises(InputError, match="all images must have the same channels, got 1 after 3"):
            list(ImageStream([image[None] for image in images] if batched else images, None))


class TestHostileFiles:
    def test_an_image_that_is_much_longer_than_wide(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
        Image.new("L", (4_000, 1)).save(tmp_path / "line.png")
        Image.new("L", (50, 40)).save(tmp_path / "usual.png")
        message = r"^line.png: an image of 4000 x 1 pixels \(width x height\) would be resized to 128000 x 32, more than Pillow"
        with pytest.raises(InputError, match=message):
            list(ImageStream(tmp_path, PREPROCESSING))
        images = ImageStream(tmp_path, PREPROCESSING, on_error="skip")
        assert len(torch.cat(list(images))) == 1
        assert images.names == ["usual.png"]

    def test_too_little_memory_is_an_error_of_that_image(self, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        crop = Preprocessing.crop

        def failing_crop(self: Preprocessing, image: Image.Image) -> Image.Image:
            if image.height == 42:
                raise MemoryError
            return crop(self, image)

        monkeypatch.setattr(Preprocessing, "crop", failing_crop)
        images = ImageStream(paths, PREPROCESSING, on_error="skip")
        assert len(torch.cat(list(images))) == 6
        assert images.skipped == [("2.jpg", "2.jpg needs more memory than there is; downsize it")]

    def test_too_little_memory_in_a_dataset(self, expected: Tensor) -> None:
        images = ImageStream(MapStyle([expected[0], MemoryError()]), None, on_error="skip")
        assert len(torch.cat(list(images))) == 1
        assert images.skipped == [("image 1", "MapStyle cannot read its image 1 (MemoryError)")]

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
    def test_pipes_and_broken_links_do_not_block(self, folder: Path, paths: list[Path]) -> None:
        os.mkfifo(folder / "pipe.jpg")
        (folder / "broken.jpg").symlink_to(folder / "nowhere")
        assert ImageStream([folder / "pipe.jpg", *paths], PREPROCESSING, on_error="skip").count == 8
        for source in (folder / "pipe.jpg", [folder / "pipe.jpg"]):
            with pytest.raises(InputError, match=r"pipe.jpg is not a regular file"):
                ImageStream(source, PREPROCESSING)
        images = ImageStream(folder, PREPROCESSING, on_error="skip")
        assert len(torch.cat(list(images))) == 7
        assert images.skipped == [("broken.jpg", f"{folder}/broken.jpg is a broken link")]

    def test_names_survive_wherever_they_are_written(self, tmp_path: Path) -> None:
        raw = os.fsencode(tmp_path) + b"/caf\xe9\n.png"
        for name in (os.fsdecode(raw), tmp_path / "[b]$x$.png"):
            try:
                Image.new("RGB", (40, 40)).save(name, "PNG")
            except OSError:
                pytest.skip("this file system accepts only names in UTF-8")
        for source in (tmp_path, HuggingFace([{"bytes": None, "path": os.fsdecode(raw)}, {"bytes": None, "path": str(name)}])):
            images = ImageStream(source, PREPROCESSING)
            list(images)
            assert sorted(images.names) == ["[b]$x$.png", r"caf\udce9\n.png"]
            assert len(images.identity()) == 64
            assert json.loads(json.dumps(images.state(), ensure_ascii=False).encode()) == images.state()


def interrupted(source: Any, after: int, **options: Any) -> dict[str, Any]:
    """The state of a stream after some images."""
    images = ImageStream(source, PREPROCESSING, batch_size=1, **options)
    for _ in images:
        if len(images.names) == after:
            break
    return images.state()


def resumed(source: Any, state: dict[str, Any], **options: Any) -> ImageStream:
    """A stream that has gone on from a state to its end."""
    images = ImageStream(source, PREPROCESSING, batch_size=1, **options)
    images.resume(state)
    list(images)
    return images


class TestResuming:
    @pytest.mark.parametrize("kind", ALL)
    def test_the_record_is_that_of_an_uninterrupted_stream(
        self, kind: str, folder: Path, paths: list[Path], expected: Tensor
    ) -> None:
        whole = ImageStream(make_source(kind, folder, paths, expected), PREPROCESSING, batch_size=1)
        list(whole)
        state = interrupted(make_source(kind, folder, paths, expected), 4)
        images = resumed(make_source(kind, folder, paths, expected), json.loads(json.dumps(state)))
        assert images.state() == whole.state()
        assert len(images.state()["contents"]) == 7

    def test_a_file_that_was_replaced_by_another_of_the_same_size(self, paths: list[Path]) -> None:
        for path in paths:
            Image.effect_noise((40, 40), 50).convert("RGB").save(path.with_suffix(".bmp"))
        files = [path.with_suffix(".bmp") for path in paths]
        state = interrupted(files, 4)
        times = files[1].stat()
        content = files[1].read_bytes()
        files[1].write_bytes(files[2].read_bytes())
        os.utime(files[1], ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(InputError, match=r"^1.bmp has changed since it was measured before the interruption; pass the ima"):
            resumed(files, state)
        files[1].write_bytes(content)
        files[5].write_bytes(files[2].read_bytes())  # not measured yet
        assert resumed(files, state).manifest.digests[5] == state["digests"][2]

    def test_a_folder_that_was_copied(self, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        state = interrupted(folder, 4)
        copied = shutil.copytree(folder, tmp_path_factory.mktemp("copied") / "photographs", copy_function=shutil.copyfile)
        assert ImageStream(copied, PREPROCESSING).identity() == ImageStream(folder, PREPROCESSING).identity()
        assert len(resumed(copied, state).names) == 7

    @pytest.mark.parametrize("kind", ["dataset", "iterable dataset", "generator", "batches", "loader", "tensor", "list"])
    def test_other_tensors(self, kind: str, expected: Tensor) -> None:
        state = interrupted(TENSORS[kind](expected), 4)
        changed = expected.clone()
        changed[2] += 1
        with pytest.raises(InputError, match=r"^image 2 has changed since it was measured"):
            resumed(TENSORS[kind](changed), state)

    def test_the_images_of_another_process_are_not_compared(self, expected: Tensor) -> None:
        state = interrupted(expected, 2, shard=(1, 2))
        expected[2] += 1
        assert resumed(expected, state, shard=(1, 2)).indices == [1, 3, 5]

    def test_few_items_of_a_long_dataset_are_read_again(self, expected: Tensor) -> None:
        items = list(expected.repeat(30, 1, 1, 1))
        state = interrupted(MapStyle(items), 200)
        dataset = MapStyle(items)
        images = ImageStream(dataset, None)
        images.resume(state)
        dataset.read.clear()
        list(images)
        assert len(images.names) == 210
        assert dataset.read == [*range(0, 200, 7), *range(200, 210)]

    def test_a_state_that_lacks_a_hash(self, expected: Tensor) -> None:
        state = interrupted(expected, 4)
        state["contents"].pop()
        with pytest.raises(InputError, match="does not hold a name, an index and two hashes of each image"):
            resumed(expected, state)

    def test_an_image_that_was_skipped_is_not_compared(self, paths: list[Path]) -> None:
        truncate(paths[1])
        state = interrupted(paths, 3, on_error="skip")
        assert resumed(paths, state, on_error="skip").skipped[0][0] == "1.jpg"

    def test_an_image_that_can_no_longer_be_read(self, expected: Tensor) -> None:
        state = interrupted(MapStyle(list(expected)), 3)
        with pytest.raises(InputError, match=r"cannot read its image 1 \(gone\)"):
            resumed(MapStyle([expected[0], OSError("gone"), *expected[2:]]), state, on_error="skip")

    @pytest.mark.parametrize("kind", ["generator", "batches"])
    def test_fewer_images_than_before(self, kind: str, expected: Tensor) -> None:
        state = interrupted(TENSORS[kind](expected), 6)
        with pytest.raises(InputError, match="there are fewer images than before the interruption; pass the images"):
            resumed(TENSORS[kind](expected[:5]) if kind == "generator" else [expected[:5]], state)


class TestIdentity:
    @pytest.mark.parametrize("kind", ALL)
    def test_the_same_list_has_the_same_identity_before_and_after_an_iteration(
        self, kind: str, folder: Path, paths: list[Path], expected: Tensor
    ) -> None:
        first = ImageStream(make_source(kind, folder, paths, expected), PREPROCESSING)
        options = dict(start=3, shard=(1, 2), batch_size=1)
        after = ImageStream(make_source(kind, folder, paths, expected), PREPROCESSING, **options)
        list(after)
        assert first.identity() == after.identity()
        assert len(first.identity()) == 64

    def test_other_lists_have_other_identities(self, folder: Path, paths: list[Path], expected: Tensor) -> None:
        def identity(images: Any) -> str:
            return ImageStream(images, PREPROCESSING).identity()

        lists: list[Any] = [paths, paths[:6], paths[::-1], expected, expected + 1, expected[:6], list(expected[:6])]
        lists += [[expected[:3], expected[3:]], [expected[:3], expected[3:] + 1], list(map(read_image, paths))]
        lists += [[read_image(path).transpose(Image.Transpose.ROTATE_180) for path in paths], MapStyle(list(expected))]
        lists += [MapStyle(list(expected[:6])), MapStyle(list(expected[..., :8])), IterableStyle(list(expected))]
        identities = [identity(images) for images in lists]
        assert identity(folder) == identities[0]
        assert len(set(identities)) == len(lists)
        paths[0].write_bytes(paths[0].read_bytes() + b"more")
        assert identity(paths) not in identities

    def test_nothing_is_decoded(self, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        images = ImageStream(paths, PREPROCESSING)
        monkeypatch.setattr(Image, "open", None)
        assert images.identity()


class TestPrefetching:
    def test_a_bounded_number_of_images_is_prepared_while_a_batch_is_in_use(self, expected: Tensor) -> None:
        dataset = MapStyle(list(expected) * 20)
        images = iter(ImageStream(dataset, None, batch_size=2))
        dataset.read.clear()
        next(images)
        deadline = time.monotonic() + 5
        while len(dataset.read) < 6 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert 6 <= len(dataset.read) <= 6 + 2 * 4  # three batches, and what the workers are busy with
        assert dataset.read == sorted(dataset.read)
        images.close()  # type: ignore[attr-defined]

    def test_files_are_read_in_parallel(self, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        barrier = threading.Barrier(2)

        def read_in_pairs(path: Path) -> Image.Image:
            barrier.wait(timeout=5)
            return read_image(path)

        monkeypatch.setattr(stream, "read_image", read_in_pairs)
        assert len(torch.cat(list(ImageStream(paths[:6], PREPROCESSING)))) == 6

    @pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), None])
    def test_leaving_early_leaves_no_thread(self, error: BaseException | None, paths: list[Path]) -> None:
        images = ImageStream(paths * 10, PREPROCESSING, batch_size=2)

        def use() -> None:
            for _ in images:
                assert any(thread.name == "vit_probe-prefetch" for thread in threading.enumerate())
                if error is not None:
                    raise error
                break

        if error is None:
            use()
        else:
            with pytest.raises(type(error)):
                use()
        assert images.names == ["0.jpg", "1.jpg"]
        assert images.provenance()["sha256"] == hashed(read_image(path).tobytes() for path in paths[:2])

    def test_leaving_early_does_not_wait_for_the_next_batch(self, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        decoded: list[Path] = []
        monkeypatch.setattr(stream, "read_image", lambda path: time.sleep(0.01) or decoded.append(path) or read_image(path))
        images = iter(ImageStream(paths * 100, PREPROCESSING, batch_size=50))
        next(images)
        images.close()  # type: ignore[attr-defined]
        assert 50 <= len(decoded) < 90
