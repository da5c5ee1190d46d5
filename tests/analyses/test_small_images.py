"""Reading sheets and folders, augmenting and mixing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from analyses.small_images import augment, mix, normalize, read_data
from tests.analyses.conftest import CLASSES, picture, write_sheets
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.errors import InputError


def pixels(count: int = 6, size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_sheets_are_cut_without_their_padding(sheets: Path) -> None:
    train, val = read_data(sheets, 16)
    assert train.classes == val.classes == list(CLASSES)
    assert train.labels.bincount().tolist() == [90, 90, 75]
    assert val.labels.bincount().tolist() == [20, 20, 20]
    assert train.images.dtype == torch.uint8
    assert train.images.shape == (255, 3, 16, 16)
    random = np.random.default_rng(0)
    for index in range(90):  # row by row, as they were written
        assert np.array_equal(train.images[index].permute(1, 2, 0).numpy(), picture("across", random))


def test_one_folder_of_images_per_class(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label, name in enumerate(("first.class", "second")):
            (tmp_path / split / name / "deep").mkdir(parents=True)
            for index in range(2 + label):
                Image.new("RGB", (40, 20), (10 * label, 100, 200)).save(tmp_path / split / name / "deep" / f"{index}.png")
    train, _ = read_data(tmp_path, 8)
    assert train.classes == ["first.class", "second"]
    assert train.labels.tolist() == [0, 0, 1, 1, 1]
    assert train.images.shape == (5, 3, 8, 8)
    assert train.images[:, :, 4, 4].tolist() == [[0, 100, 200]] * 2 + [[10, 100, 200]] * 3


def test_sheets_are_resized(sheets: Path) -> None:
    _, val = read_data(sheets, 24)
    assert val.images.shape == (60, 3, 24, 24)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "there is no image file or folder .*train"),
        (lambda folder: write_sheets(folder / "train", {"across": 20}, 0), "there is no image file or folder .*val"),
        (
            lambda folder: [write_sheets(folder / split, {name: 20}, 0) for split, name in (("train", "a"), ("val", "b"))],
            "train and val have different classes; only one of them has a, b",
        ),
        (
            lambda folder: (
                write_sheets(folder / "train", {"a": 20}, 0),
                Image.new("RGB", (50, 16)).save(folder / "train/b.png"),
            ),
            r"b.png is 50 x 16 pixels, which is not a sheet of square images, 20 per row",
        ),
    ],
    ids=["nothing", "no val", "other classes", "no sheet"],
)
def test_unreadable_data(make: object, message: str, tmp_path: Path) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        read_data(tmp_path, 16)


def test_normalize_equals_the_model_s_preprocessing() -> None:
    image = pixels(1)
    prepare = Preprocessing((16, 16), resize=16)
    expected = prepare(Image.fromarray(image[0].permute(1, 2, 0).numpy()))
    torch.testing.assert_close(normalize(image)[0], expected)


def test_augmenting_varies_each_image_by_itself_and_repeats_with_the_seed() -> None:
    same = pixels(1).expand(8, -1, -1, -1)
    first, again = (augment(same, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (8, 3, 16, 16)
    assert all((first[0] - other).abs().max() > 0.5 for other in first[1:])
    black_to_white = normalize(torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1))
    assert (first >= black_to_white[0] - 1e-5).all()
    assert (first <= black_to_white[1] + 1e-5).all()


def test_augmenting_keeps_a_grey_image_grey_and_constant() -> None:
    grey = torch.full((16, 3, 8, 8), 128, dtype=torch.uint8)
    values = augment(grey, torch.Generator().manual_seed(0))
    mean, std = torch.tensor(Preprocessing.imagenet((1, 1)).mean), torch.tensor(Preprocessing.imagenet((1, 1)).std)
    levels = values * std[:, None, None] + mean[:, None, None]
    spread = levels.flatten(1).max(1).values - levels.flatten(1).min(1).values
    assert spread.max() < 1e-4
    assert levels.mean(dim=(1, 2, 3)).std() > 0.05  # brightness differs from image to image


def test_mixing_returns_the_share_of_each_image() -> None:
    """In images of one colour, the share can be read off the pixels."""
    values = torch.arange(5.0)[:, None, None, None].expand(-1, 3, 10, 10)
    random, shares, boxes = torch.Generator().manual_seed(0), [], 0
    for _ in range(40):
        mixed, partner, share = mix(values, random)
        expected = share * torch.arange(5.0) + (1 - share) * partner
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), expected)
        shares.append(share)
        boxes += int(all(set(image.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0} for image in mixed))
    assert 8 < boxes < 32  # cutmix in about half of them, mixup in the others
    assert min(shares) < 0.3 < 0.7 < max(shares)
    assert torch.equal(values[:, 0, 0, 0], torch.arange(5.0))  # the batch itself is untouched
