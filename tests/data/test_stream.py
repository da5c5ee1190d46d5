"""ImageStream over datasets, patterns and broken files; parts of it; ahead of the model."""

from __future__ import annotations

import hashlib
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
from vit_probe.data.preprocessing import find_images, read_image
from vit_probe.data.stream import ImageStream

PREPARE = Preprocessing(size=(16, 24), resize=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("vit_probe")] == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven photographs as JPEG files, which have no checksums, two of them in a folder below."""
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
    return torch.stack([PREPARE(read_image(path)) for path in paths])


def hashed(images: Iterable[bytes]) -> str:
    """The hash of the hashes of images."""
    return hashlib.sha256("".join(hashlib.sha256(image).hexdigest() for image in images).encode()).hexdigest()


def taken(images: Iterable[Any], into: list[Any]) -> None:
    """Goes through `images` as far as they can be had."""
    for image in images:
        into.append(image)


def cut(path: Path) -> None:
    """Cuts off a file, which its header does not show."""
    path.write_bytes(path.read_bytes()[:1500])


class Items(Dataset[Any]):
    """A map-style dataset of torch."""

    def __init__(self, items: list[Any]) -> None:
        self.items, self.asked = items, list[int]()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        if isinstance(item := self.items[index], Exception):
            raise item
        return item


class Streamed(IterableDataset[Any]):
    """An iterable-style one."""

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
    """What Hugging Face gives with `Image(decode=False)`: bytes, a path, or both."""
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
    "dataset of photographs": lambda folder, paths: Items([read_image(path) for path in paths]),
    "labelled dataset": lambda folder, paths: Items([(Image.open(path), 3) for path in paths]),
    "dataset of files": lambda folder, paths: Items(list(paths)),
    "iterable dataset": lambda folder, paths: Streamed([(read_image(path), 3) for path in paths]),
    "Hugging Face": lambda folder, paths: HuggingFace([read_image(path) for path in paths]),
    "Hugging Face, img": lambda folder, paths: HuggingFace([read_image(path) for path in paths], key="img"),
    "Hugging Face, streamed": lambda folder, paths: HuggingFaceStreamed([read_image(path) for path in paths]),
    "Hugging Face, not decoded": lambda folder, paths: HuggingFace(_files(paths)),
}
TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "dataset": lambda x: Items(list(x)),
    "labelled dataset": lambda x: TensorDataset(x, torch.arange(len(x))),
    "dataset of batches": lambda x: Items(list(x.split(3))),
    "list": list,
    "iterable dataset": lambda x: Streamed(list(x)),
    "generator": lambda x: iter(x),
    "batches": lambda x: list(x.split([1, 4, 2])),
    "loader": lambda x: DataLoader(TensorDataset(x), batch_size=3),
    "loader of dictionaries": lambda x: DataLoader([{"pixel_values": image} for image in x], batch_size=2),  # type: ignore[arg-type]
    "double precision": lambda x: list(x.double()),
}


class TestKinds:
    @pytest.mark.parametrize("kind", PHOTOGRAPHS)
    def test_photographs(self, kind: str, folder: Path, paths: list[Path], expected: Tensor) -> None:
        images = ImageStream(PHOTOGRAPHS[kind](folder, paths), PREPARE, batch_size=3)
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

    def test_names_of_files(self, paths: list[Path]) -> None:
        names = [path.name for path in paths]
        for images in (paths, HuggingFace(_files(paths))):
            opened = ImageStream(images, PREPARE)
            list(opened)
            assert opened.names == [*names[:2], opened.names[2], *names[3:]]
            assert opened.count == 7

    @pytest.mark.parametrize("kind", ["list", "dataset", "batches", "loader", "iterable dataset"])
    def test_a_second_pass_is_the_same(self, kind: str, expected: Tensor) -> None:
        images = ImageStream(TENSORS[kind](expected), None)
        for _ in range(2):
            torch.testing.assert_close(torch.cat(list(images)), expected)
            assert len(images.names) == 7

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            ({"train": [], "test": []}, r"images are a dict of \['test', 'train'\]; pass one of these"),
            ({"a.jpg"}, "images are a set, which has no order; pass a list"),
            ("nowhere.jpg", "there is no image file or folder nowhere.jpg"),
            (["nowhere.jpg"], "there is no image file nowhere.jpg"),
            ("nowhere/**/*.jpg", r"the pattern nowhere/\*\*/\*.jpg matches no image file"),
            (["nowhere/?.jpg"], r"the pattern nowhere/\?.jpg matches no image file"),
            (Items([]), "there are no images; pass at least one"),
            (HuggingFace([3]), r"images are PIL images, paths or tensors \(channel, height, width\), got int; batches have"),
            (Items([{"picture": 3}]), r"an image is a dictionary of \['picture'\]; the image itself must be under 'image'"),
            (Items([torch.ones(3, 8, 8, dtype=torch.uint8)]), r"images are torch.uint8; tensors must be preprocessed"),
            (Items([np.ones((8, 8, 3))]), r"got ndarray of shape \(8, 8, 3\)"),
            (Items([OSError("gone"), OSError("gone too")]), r"Items cannot read any of its 2 images; the last: gone too"),
        ],
    )
    def test_what_cannot_be_used(self, images: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            ImageStream(images, PREPARE)

    def test_tensors_of_two_sizes(self) -> None:
        images = ImageStream(Items([torch.rand(3, 8, 8), torch.rand(3, 8, 16)]), None)
        with pytest.raises(InputError, match="8 x 16 pixels follow ones of 8 x 8; measure one size at a time"):
            list(images)

    def test_a_pattern_passes_by_what_is_no_image(self, folder: Path) -> None:
        (folder / "notes.txt").write_text("no image")
        assert [path.name for path in find_images([f"{folder}/*"])] == [f"{index}.jpg" for index in range(5)]

    def test_a_file_whose_name_looks_like_a_pattern(self, folder: Path) -> None:
        (folder / "0.jpg").rename(folder / "[1].jpg")
        assert find_images([f"{folder}/[1].jpg"]) == [folder / "[1].jpg"]


class TestBroken:
    def test_what_only_decoding_shows_stops_in_its_place(self, paths: list[Path]) -> None:
        cut(paths[4])
        images, given = ImageStream(paths, PREPARE, batch_size=2), list[Tensor]()
        with pytest.raises(InputError, match=r"4.jpg cannot be decoded .* may be truncated"):
            taken(images, given)
        assert [len(batch) for batch in given] == [2, 2]
        assert images.names == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]

    def test_the_check_at_the_start_is_of_headers_and_decodes_nothing(
        self, paths: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(stream, "read_image", None)
            patched.setattr("vit_probe.data.preprocessing.read_image", None)
            ImageStream(paths, PREPARE)
        paths[5].write_text("no image")
        with pytest.raises(InputError, match=r"5.jpg is not an image that can be read"):
            ImageStream(paths, PREPARE)
        ImageStream(paths, PREPARE, start=6)
        ImageStream(paths, PREPARE, shard=(0, 2))

    def test_each_file_is_decoded_once(self, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        decoded: list[Path] = []
        monkeypatch.setattr(stream, "read_image", lambda path: decoded.append(path) or read_image(path))
        list(ImageStream(paths, PREPARE, batch_size=2))
        assert sorted(decoded) == sorted(paths)

    def test_a_file_that_decodes_though_its_end_is_missing_is_taken(self, tmp_path: Path) -> None:
        Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
        (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-12])
        assert len(torch.cat(list(ImageStream(tmp_path, PREPARE)))) == 1

    def test_values_of_unknown_range_come_up_at_the_start(self, tmp_path: Path) -> None:
        Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(tmp_path / "odd.tif")
        with pytest.raises(InputError, match=r"odd.tif holds 32-bit values"):
            ImageStream(tmp_path, PREPARE)

    @pytest.mark.parametrize("batch_size", [1, 2, 7])
    def test_skip(self, batch_size: int, paths: list[Path], expected: Tensor) -> None:
        cut(paths[0])
        paths[3].write_text("no image")
        paths[6].unlink()
        images = ImageStream(paths, PREPARE, batch_size=batch_size, on_error="skip")
        batches = list(images)
        assert [len(batch) for batch in batches] == {1: [1, 1, 1, 1], 2: [2, 2], 7: [4]}[batch_size]
        torch.testing.assert_close(torch.cat(batches), expected[[1, 2, 4, 5]], rtol=0, atol=0)
        assert [name for name, _ in images.skipped] == ["0.jpg", "3.jpg", "6.jpg"]
        assert (images.count, images.indices, images.position) == (7, [1, 2, 4, 5], 7)
        provenance = images.provenance()
        assert provenance["names"] == ["1.jpg", "2.jpg", "4.jpg", "5.jpg"]
        assert "may be truncated" in provenance["skipped"]["0.jpg"]
        assert provenance["skipped"]["3.jpg"].endswith("3.jpg is not an image that can be read")
        assert provenance["skipped"]["6.jpg"].startswith("there is no image file")
        good = ImageStream([paths[index] for index in (1, 2, 4, 5)], PREPARE)
        list(good)
        assert provenance["sha256"] == good.provenance()["sha256"]

    def test_files_of_one_name_are_all_listed(self, folder: Path) -> None:
        for name in ("a", "b"):
            (folder / name).mkdir()
            (folder / name / "same.jpg").write_text(name)
        images = ImageStream(folder, PREPARE, on_error="skip")
        list(images)
        assert list(images.provenance()["skipped"]) == ["same.jpg", "same.jpg (2)"]

    @pytest.mark.parametrize("broken", [OSError("disk on fire"), None])
    def test_images_that_a_dataset_cannot_give(self, broken: Exception | None, expected: Tensor) -> None:
        items = [broken, *expected[:2], broken] if broken else [*expected[:2], None]
        reason = r"Items cannot read its image 0 \(disk on fire\)" if broken else "image 2 is None"
        with pytest.raises(InputError, match=reason):
            list(ImageStream(Items(items), None))
        images = ImageStream(Items(items), None, on_error="skip")
        torch.testing.assert_close(torch.cat(list(images)), expected[:2])
        assert len(images.skipped) == len(items) - 2

    def test_a_photograph_that_was_only_opened(self, paths: list[Path]) -> None:
        cut(paths[1])
        images = ImageStream([Image.open(path) for path in paths], PREPARE, on_error="skip")
        assert len(torch.cat(list(images))) == 6
        assert [name for name, _ in images.skipped] == ["image 1"]
        with pytest.raises(InputError, match="image 1 cannot be decoded"):
            list(ImageStream([Image.open(path) for path in paths], PREPARE))

    def test_other_exceptions_of_a_dataset_are_no_broken_images(self, expected: Tensor) -> None:
        images = ImageStream(Items([*expected[:2], RuntimeError("a mistake")]), None, batch_size=1, on_error="skip")
        with pytest.raises(RuntimeError, match="a mistake"):
            list(images)
        assert len(images.names) == 2

    def test_nothing_is_left(self, paths: list[Path]) -> None:
        for path in paths:
            cut(path)
        images = ImageStream(paths, PREPARE, on_error="skip")
        with pytest.raises(InputError, match=r"none of the 7 images can be read; the first, 0.jpg: .*0.jpg cannot be dec"):
            list(images)

    def test_on_error_is_stop_or_skip(self) -> None:
        with pytest.raises(InputError, match="on_error must be 'stop' or 'skip', got 'ignore'"):
            ImageStream(torch.rand(1, 3, 8, 8), None, on_error="ignore")  # type: ignore[arg-type]


ALL = [*(f"photographs: {kind}" for kind in PHOTOGRAPHS), *TENSORS]


def given(kind: str, folder: Path, paths: list[Path], expected: Tensor) -> Any:
    """Images of any kind of the two tables above."""
    photographs = PHOTOGRAPHS.get(kind.removeprefix("photographs: ")) if kind.startswith("photo") else None
    return photographs(folder, paths) if photographs else TENSORS[kind](expected)


class TestParts:
    @pytest.mark.parametrize("kind", ALL)
    def test_from_start_and_every_nth(self, kind: str, folder: Path, paths: list[Path], expected: Tensor) -> None:
        for start in (0, 1, 4, 6, 7):
            for processes in (1, 2, 3):
                found: dict[int, Tensor] = {}
                for rank in range(processes):
                    part = dict(start=start, shard=(rank, processes))
                    images = ImageStream(given(kind, folder, paths, expected), PREPARE, batch_size=2, **part)
                    mine = [index for index in range(start, 7) if index % processes == rank]
                    batches = list(images)
                    assert all(map(len, batches))
                    assert images.indices == mine
                    assert images.count in (len(mine), None)
                    assert len(images.names) == len(mine)
                    assert images.position == (mine[-1] + 1 if mine else start)
                    found |= dict(zip(mine, torch.cat(batches) if batches else [], strict=True))
                assert sorted(found) == list(range(start, 7))
                for index, image in found.items():
                    torch.testing.assert_close(image.float(), expected[index], rtol=0, atol=0)

    def test_position_is_where_another_stream_goes_on(self, paths: list[Path], expected: Tensor) -> None:
        cut(paths[2])
        images = ImageStream(paths, PREPARE, batch_size=2, on_error="skip")
        for batch in images:
            first = batch
            if len(images.names) == 4:
                break
        rest = torch.cat(list(ImageStream(paths, PREPARE, start=images.position, on_error="skip")))
        torch.testing.assert_close(first, expected[[3, 4]])
        torch.testing.assert_close(rest, expected[5:])

    def test_images_before_the_start_are_not_asked_for(self, expected: Tensor) -> None:
        dataset = Items(list(expected))
        images = ImageStream(dataset, None, start=4)
        dataset.asked.clear()
        list(images)
        assert dataset.asked == [4, 5, 6]

    def test_a_share_of_broken_images_is_no_error(self, paths: list[Path]) -> None:
        cut(paths[6])
        images = ImageStream(paths, PREPARE, on_error="skip", start=6)
        assert list(images) == []
        assert images.position == 7

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"start": -1}, "start must be at least 0, got -1"),
            ({"start": 8}, "start is 8, but there are 7 images"),
            ({"shard": (2, 2)}, r"shard must be \(rank, processes\) with 0 <= rank < processes, got \(2, 2\)"),
            ({"shard": (-1, 2)}, r"got \(-1, 2\)"),
            ({"shard": (0, 0)}, r"got \(0, 0\)"),
        ],
    )
    def test_no_such_part(self, options: dict[str, Any], message: str, expected: Tensor) -> None:
        with pytest.raises(InputError, match=message):
            ImageStream(expected, None, **options)


class TestIdentity:
    @pytest.mark.parametrize("kind", ALL)
    def test_the_same_list_is_the_same_before_and_after_a_pass(
        self, kind: str, folder: Path, paths: list[Path], expected: Tensor
    ) -> None:
        first = ImageStream(given(kind, folder, paths, expected), PREPARE)
        part = dict(start=3, shard=(1, 2), batch_size=1)
        after = ImageStream(given(kind, folder, paths, expected), PREPARE, **part)
        list(after)
        assert first.identity() == after.identity()
        assert len(first.identity()) == 64

    def test_other_lists_differ(self, folder: Path, paths: list[Path], expected: Tensor) -> None:
        def identity(images: Any) -> str:
            return ImageStream(images, PREPARE).identity()

        lists: list[Any] = [paths, paths[:6], paths[::-1], expected, expected + 1, expected[:6], list(expected[:6])]
        lists += [[expected[:3], expected[3:]], [expected[:3], expected[3:] + 1], list(map(read_image, paths))]
        lists += [[read_image(path).transpose(Image.Transpose.ROTATE_180) for path in paths], Items(list(expected))]
        lists += [Items(list(expected[:6])), Items(list(expected[..., :8])), Streamed(list(expected))]
        identities = [identity(images) for images in lists]
        assert identity(folder) == identities[0]
        assert len(set(identities)) == len(lists)
        paths[0].write_bytes(paths[0].read_bytes() + b"more")
        assert identity(paths) not in identities

    def test_nothing_is_decoded(self, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        images = ImageStream(paths, PREPARE)
        monkeypatch.setattr(Image, "open", None)
        assert images.identity()


class TestAhead:
    def test_images_are_prepared_while_a_batch_is_in_use_but_not_all(self, expected: Tensor) -> None:
        dataset = Items(list(expected) * 20)
        images = iter(ImageStream(dataset, None, batch_size=2))
        dataset.asked.clear()
        next(images)
        deadline = time.monotonic() + 5
        while len(dataset.asked) < 6 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert 6 <= len(dataset.asked) <= 6 + 2 * 4  # three batches, and what the workers have at hand
        assert dataset.asked == sorted(dataset.asked)
        images.close()  # type: ignore[attr-defined]

    def test_several_files_at_once(self, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        both = threading.Barrier(2)

        def together(path: Path) -> Image.Image:
            both.wait(timeout=5)
            return read_image(path)

        monkeypatch.setattr(stream, "read_image", together)
        assert len(torch.cat(list(ImageStream(paths[:6], PREPARE)))) == 6

    @pytest.mark.parametrize("end", [RuntimeError("broken"), KeyboardInterrupt(), None])
    def test_leaving_early_leaves_no_thread(self, end: BaseException | None, paths: list[Path]) -> None:
        images = ImageStream(paths * 10, PREPARE, batch_size=2)

        def use() -> None:
            for _ in images:
                assert any(thread.name == "vit_probe-prefetch" for thread in threading.enumerate())
                if end is not None:
                    raise end
                break

        if end is None:
            use()
        else:
            with pytest.raises(type(end)):
                use()
        assert images.names == ["0.jpg", "1.jpg"]
        assert images.provenance()["sha256"] == hashed(read_image(path).tobytes() for path in paths[:2])

    def test_leaving_waits_for_no_more_than_what_is_at_hand(self, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        decoded: list[Path] = []
        monkeypatch.setattr(stream, "read_image", lambda path: time.sleep(0.01) or decoded.append(path) or read_image(path))
        images = iter(ImageStream(paths * 100, PREPARE, batch_size=50))
        next(images)
        images.close()  # type: ignore[attr-defined]
        assert 50 <= len(decoded) < 90
