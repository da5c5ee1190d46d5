"""Finding, reading, preprocessing and streaming photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vit_probe import InputError, Preprocessing, sample_photographs
from vit_probe.data.image_files import find_images, read_image
from vit_probe.data.stream import ImageStream

PREPROCESSING = Preprocessing(size=(16, 24), resize=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class TestPreprocessing:
    @pytest.mark.parametrize(("height", "width", "resized"), [(64, 96, (32, 48)), (96, 64, (48, 32)), (32, 32, (32, 32))])
    def test_shorter_side_then_centre_crop(self, height: int, width: int, resized: tuple[int, int]) -> None:
        image = noise(height, width)
        rows, cols = resized
        expected = np.asarray(image.resize((cols, rows), Image.Resampling.BICUBIC))
        top, left = (rows - 16) // 2, (cols - 24) // 2
        np.testing.assert_array_equal(np.asarray(PREPROCESSING.crop(image)), expected[top : top + 16, left : left + 24])

    @pytest.mark.parametrize("resize", [224, 256])
    def test_the_shorter_side_is_exact_for_every_size(self, resize: int) -> None:
        prepare = Preprocessing(size=(resize, resize), resize=resize)
        for side in range(16, 600, 7):
            assert prepare.crop(Image.new("RGB", (side, side), "white")).getextrema() == ((255, 255),) * 3, side

    def test_scaled_keeps_the_proportion(self) -> None:
        assert Preprocessing(size=(224, 224), resize=256).scaled((448, 448)) == Preprocessing(size=(448, 448), resize=512)
        assert Preprocessing(size=(64, 64), resize=(64, 64)).scaled((96, 96)) == Preprocessing(size=(96, 96), resize=(96, 96))

    def test_imagenet(self) -> None:
        assert Preprocessing.imagenet((224, 224), interpolation="bilinear") == Preprocessing(
            (224, 224), 256, interpolation="bilinear"
        )

    def test_an_exact_size_changes_the_aspect_ratio(self) -> None:
        prepare = Preprocessing(size=(8, 8), resize=(8, 8), interpolation="bilinear")
        image = noise(20, 40)
        np.testing.assert_array_equal(
            np.asarray(prepare.crop(image)), np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR))
        )

    def test_the_centre_crop_rounds_half_to_even_as_torchvision(self) -> None:
        prepare = Preprocessing(size=(4, 4), resize=7)  # (7 - 4) / 2 = 1.5 rounds to 2
        image = noise(7, 7)
        np.testing.assert_array_equal(np.asarray(prepare.crop(image)), np.asarray(image)[2:6, 2:6])

    @pytest.mark.parametrize("rounding", ["half_to_even", "down"])
    @pytest.mark.parametrize(
        ("margin", "half_to_even", "down"),
        [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 2, 1), (5, 2, 2), (7, 4, 3), (-1, 0, 0), (-3, -1, -1)],
    )
    def test_half_a_pixel_of_margin(self, margin: int, half_to_even: int, down: int, rounding: str) -> None:
        """As in torchvision and in transformers; where a photograph is too small, both pad less above and left."""
        prepare = Preprocessing((8, 8), (8, 8 + margin), crop_rounding=rounding)  # type: ignore[arg-type]
        image = noise(8, 8 + margin)
        left = {"half_to_even": half_to_even, "down": down}[rounding]
        expected = np.zeros((8, 8, 3), np.uint8)
        start, end = max(left, 0), min(left + 8, 8 + margin)
        expected[:, start - left : end - left] = np.asarray(image)[:, start:end]
        np.testing.assert_array_equal(np.asarray(prepare.crop(image)), expected)
        assert prepare.scaled((16, 16)).crop_rounding == rounding

    def test_an_image_that_would_become_too_large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 320)
        assert PREPROCESSING.crop(noise(10, 100)).size == (24, 16)
        assert PREPROCESSING.crop(noise(110, 100)).size == (24, 16)  # made smaller, however large it is
        with pytest.raises(
            InputError, match=r"an image of 101 x 10 pixels \(width x height\) would be resized to 323 x 32, more"
        ):
            PREPROCESSING.crop(noise(10, 101))
        with pytest.raises(InputError, match="would be resized to 300 x 200, more than Pillow decodes by default"):
            Preprocessing(size=(8, 8), resize=(200, 300)).crop(noise(10, 10))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        assert PREPROCESSING.crop(noise(10, 101)).size == (24, 16)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"size": (0, 8)}, r"size and resize must be at least 1 pixel, got size=\(0, 8\) and resize=8"),
            ({"resize": -1}, "must be at least 1 pixel"),
            ({"resize": (8, 0)}, "must be at least 1 pixel"),
            ({"std": (1.0, 0.0, 1.0)}, r"std above 0, got mean=\(0.485, 0.456, 0.406\) and std=\(1.0, 0.0, 1.0\)"),
            ({"mean": (float("nan"), 0.0, 0.0)}, "mean and std must be finite"),
            ({"interpolation": "box"}, "interpolation must be one of nearest, bilinear, bicubic, lanczos; got 'box'"),
            ({"interpolation": ["bilinear"]}, r"got \['bilinear'\]"),
            (
                {"size": 8},
                r"size must be a pair \(height, width\), such as \(224, 224\), and resize an int or a pair; got 8 and 8",
            ),
            ({"size": (8, 8.0)}, r"got \(8, 8.0\) and 8"),
            ({"resize": "8"}, r"got \(8, 8\) and '8'"),
            ({"mean": 0.5}, r"mean and std must have three values each, .*got 0.5 and"),
            ({"std": ("a", "b", "c")}, r"and \('a', 'b', 'c'\)"),
            ({"crop_rounding": "up"}, "crop_rounding must be half_to_even or down, got 'up'"),
        ],
    )
    def test_impossible_values_raise(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            Preprocessing(**{"size": (8, 8), "resize": 8} | fields)

    def test_a_size_that_is_no_pair(self) -> None:
        for call in (Preprocessing.imagenet, PREPROCESSING.scaled):
            with pytest.raises(InputError, match=r"size must be a pair \(height, width\), such as \(224, 224\); got 224"):
                call(224)  # type: ignore[arg-type]

    def test_standardised_per_channel(self) -> None:
        flat = Image.new("RGB", (64, 64), (255, 0, 51))
        pixels = PREPROCESSING(flat)
        assert pixels.shape == (3, 16, 24)
        expected = torch.tensor([(1 - 0.5) / 0.2, (0 - 0.4) / 0.3, (0.2 - 0.3) / 0.4])
        torch.testing.assert_close(pixels[:, 3, 5], expected)

    def test_values_equal_those_of_torch_exactly(self) -> None:
        image = noise(40, 60)
        pixels = torch.from_numpy(np.array(PREPROCESSING.crop(image))).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (PREPROCESSING.mean, PREPROCESSING.std))
        torch.testing.assert_close(PREPROCESSING(image), (pixels - mean) / std, rtol=0, atol=0)
        assert PREPROCESSING(image).is_contiguous()

    def test_denormalize_restores_the_photograph(self) -> None:
        image = noise(70, 90)
        np.testing.assert_array_equal(
            PREPROCESSING.denormalize(PREPROCESSING(image)[None])[0], np.asarray(PREPROCESSING.crop(image))
        )

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
    def test_other_modes_become_rgb(self, mode: str) -> None:
        assert PREPROCESSING(noise(40, 40).convert(mode)).shape == (3, 16, 24)


class TestSamplePhotographs:
    def test_whole_photographs_then_deterministic_crops(self) -> None:
        first, again = sample_photographs(8), sample_photographs(8)
        assert [image.info["name"] for image in first[:4]] == ["china", "flower", "grace_hopper", "china, crop 1"]
        assert len({image.tobytes() for image in first}) == 8
        assert [image.tobytes() for image in first] == [image.tobytes() for image in again]
        assert all(image.mode == "RGB" for image in first)

    def test_default_count(self) -> None:
        assert len(sample_photographs()) == 128


class TestImageStream:
    def test_photographs_paths_and_tensors_give_the_same_batches(self, folder: Path) -> None:
        paths = find_images([folder])
        expected = torch.stack([PREPROCESSING(read_image(path)) for path in paths])
        batches = expected.split(3)
        for images in (folder, str(folder), paths, [read_image(p) for p in paths], expected, list(batches), iter(batches)):
            stream = ImageStream(images, PREPROCESSING, batch_size=3)
            assert stream.image_size == (16, 24)
            torch.testing.assert_close(torch.cat(list(stream)), expected, rtol=0, atol=0)

    def test_exif_orientation_is_applied_to_files_and_photographs(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        noise(40, 60).save(tmp_path / "turned.png", exif=exif)
        with Image.open(tmp_path / "turned.png") as image:
            streams = [ImageStream(images, PREPROCESSING) for images in ([image], [tmp_path / "turned.png"])]
            torch.testing.assert_close(*(torch.cat(list(stream)) for stream in streams), rtol=0, atol=0)

    def test_labelled_batches(self) -> None:
        images, labels = torch.rand(4, 3, 16, 24), torch.arange(4)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=3)
        torch.testing.assert_close(torch.cat(list(ImageStream(loader, None))), images)

    def test_batch_size(self) -> None:
        assert [len(batch) for batch in ImageStream(torch.rand(7, 3, 8, 8), None, batch_size=3)] == [3, 3, 1]

    def test_names_and_hash_do_not_depend_on_the_batch_size(self, folder: Path) -> None:
        provenance = []
        for batch_size in (1, 3):
            stream = ImageStream(folder, PREPROCESSING, batch_size=batch_size)
            list(stream)
            provenance.append(stream.provenance())
        assert provenance[0] == provenance[1]
        assert provenance[0]["names"] == ["a.JPG", "b.png", "d.png", "c.jpeg"]
        assert provenance[0]["count"] == 4

    def test_the_hash_depends_on_the_pixels(self) -> None:
        digests = set()
        for seed in (0, 1):
            stream = ImageStream(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), None)
            list(stream)
            digests.add(stream.provenance()["sha256"])
        assert len(digests) == 2

    def test_keeps_the_first_for_display(self, folder: Path) -> None:
        stream = ImageStream(folder, PREPROCESSING, batch_size=2, keep=3)
        list(stream)
        kept = stream.kept()
        assert kept is not None
        expected = [np.asarray(PREPROCESSING.crop(read_image(path))) for path in find_images([folder])[:3]]
        np.testing.assert_array_equal(kept, np.stack(expected))

    def test_keeps_nothing_without_preprocessing(self) -> None:
        stream = ImageStream(torch.rand(2, 3, 8, 8), None, keep=2)
        list(stream)
        assert stream.kept() is None

    def test_keeps_nothing_of_images_in_other_channels(self) -> None:
        stream = ImageStream(torch.rand(2, 4, 8, 8), PREPROCESSING, keep=2)
        list(stream)
        assert stream.kept() is None

    def test_broken_checksums_raise_at_the_start(self, folder: Path) -> None:
        (folder / "z.png").write_bytes((folder / "b.png").read_bytes()[:500])
        with pytest.raises(InputError, match=r"z.png cannot be decoded"):
            ImageStream(folder, PREPROCESSING)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (torch.rand(3, 8, 8), r"must have shape \(batch, channel, height, width\), got Tensor of shape \(3, 8, 8\)"),
            ([], "there are no images"),
            (iter([]), "there are no images"),
            (torch.rand(0, 3, 8, 8), "there are no images"),
            (3, "must be a tensor, photographs, paths, a dataset or an iterable of batches, got int"),
            ([torch.rand(8, 8)], r"or a tensor \(channel, height, width\), got Tensor of shape \(8, 8\)"),
            ([{"image": 1}], "got int"),
            ((torch.rand(1, 3, 8, 8) * 255).to(torch.uint8), r"must be floating point, preprocessed .*, got torch.uint8"),
            ([torch.zeros(1, 3, 8, 8, dtype=torch.int64)], r"must be floating point, preprocessed .*, got torch.int64"),
            ([Image.new("RGB", (8, 8)), torch.rand(3, 8, 8)], "must contain only PIL images and paths, got Tensor"),
        ],
    )
    def test_unsupported_images_raise(self, images: object, message: str) -> None:
        with pytest.raises(InputError, match=message):
            ImageStream(images, PREPROCESSING)  # type: ignore[arg-type]

    def test_photographs_without_preprocessing(self) -> None:
        with pytest.raises(InputError, match="does not define how photographs are preprocessed; pass preprocessing=Prep"):
            ImageStream([noise(20, 20)], None)

    def test_images_of_different_sizes_raise(self) -> None:
        stream = ImageStream([torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 16)], None)
        with pytest.raises(InputError, match="must have the same size, got 8 x 16 pixels after 8 x 8; resize them"):
            list(stream)

    def test_batch_size_below_one(self) -> None:
        with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
            ImageStream(torch.rand(1, 3, 8, 8), None, batch_size=0)
