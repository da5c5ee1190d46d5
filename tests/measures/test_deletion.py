"""Deletion: a literal version, models whose evidence is known, and invariances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from tests.example_models import FAMILIES, classifier, images, small_vit
from vit_probe import InputError, Preprocessing, TokenGrid, VisionTransformer, load_result, sample_photographs
from vit_probe.measures.deletion import DeletionResult, _pixels, deletion


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    return small_vit()


def random_maps(count: int = 3, rows: int = 3, cols: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, rows, cols))


def literal(model: nn.Module, x: Tensor, maps: np.ndarray, patch: tuple[int, int], counts: list[int]) -> np.ndarray:
    """Probabilities (image, step), one image and one patch at a time."""
    curves = np.zeros((len(x), len(counts)))
    for index, image in enumerate(x):
        with torch.no_grad():
            scores = model(image[None])[0].double()
        predicted = int(scores.argmax())
        rows, cols = maps[index].shape
        places = sorted(np.ndindex(rows, cols), key=lambda place: (-maps[index][place], place))
        for step, count in enumerate(counts):
            painted = image.clone()
            for row, col in places[:count]:
                for channel in range(len(image)):
                    painted[channel, row * patch[0] : (row + 1) * patch[0], col * patch[1] : (col + 1) * patch[1]] = image[
                        channel
                    ].mean()
            with torch.no_grad():
                curves[index, step] = torch.softmax(model(painted[None])[0].double(), 0)[predicted]
    return curves


@pytest.mark.parametrize(("steps", "counts"), [(1, [0, 12]), (4, [0, 3, 6, 9, 12]), (5, [0, 2, 5, 7, 10, 12])])
def test_patch_by_patch(model: VisionTransformer, steps: int, counts: list[int]) -> None:
    x, maps = images(), random_maps()
    result = deletion(model, x, {"one": maps, "other": -maps}, steps=steps, batch_size=2)
    assert result.orders == ["one", "other", "random"]
    np.testing.assert_allclose(result.fractions, np.array(counts) / 12)
    for order, ranked in enumerate((maps, -maps)):
        np.testing.assert_allclose(result.probability[order], literal(model, x, ranked, (8, 6), counts), rtol=0, atol=1e-6)
    assert np.ptp(result.probability, axis=2).min() > 1e-4


def test_any_batch_gives_the_same_and_the_seed_another_random_order(model: VisionTransformer) -> None:
    x, maps = images(batch=5), random_maps(5)
    first, second = (deletion(model, x, {"one": maps}, batch_size=size) for size in (5, 2))
    np.testing.assert_allclose(first.probability, second.probability, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(first.predicted, second.predicted)
    other = deletion(model, x, {"one": maps}, seed=1)
    np.testing.assert_allclose(first.probability[0], other.probability[0], rtol=0, atol=1e-6)
    assert np.abs(first.probability[1] - other.probability[1]).max() > 1e-4


def test_the_random_order_takes_each_image_apart_in_its_own_way(model: VisionTransformer) -> None:
    x = images(batch=1).expand(4, -1, -1, -1)
    curves = deletion(model, x, {}).probability[0]
    assert np.ptp(curves[:, [0, -1]], axis=0).max() < 1e-6
    assert np.ptp(curves[:, 4]) > 1e-4


class LooksAt(nn.Module):
    """Two classes that depend on the brightness of one patch only; the attention has no effect on them."""

    num_classes = 2

    def __init__(self, row: int, col: int) -> None:
        super().__init__()
        self.vit = small_vit()
        self.place = slice(8 * row, 8 * row + 8), slice(6 * col, 6 * col + 6)

    def forward(self, x: Tensor) -> Tensor:
        self.vit(x)
        light = x[:, :, *self.place].mean(dim=(1, 2, 3))
        return torch.stack([light, -light], dim=1)

    def token_grid(self, height: int, width: int) -> TokenGrid:
        return self.vit.token_grid(height, width)

    @property
    def config(self) -> Any:
        return self.vit.config


def test_the_probability_falls_when_the_evidence_goes() -> None:
    x = 0.1 * images()
    x[:, :, 8:16, 12:18] += 2  # of patch (1, 2)
    maps = np.zeros((3, 3, 4))
    maps[:, 1, 2] = 1
    result = deletion(LooksAt(1, 2), x, {"evidence": maps, "last": -maps}, steps=12)
    assert result.predicted.tolist() == [0, 0, 0]
    evidence, last, _ = result.probability
    assert evidence[:, 0].min() > 0.95
    assert evidence[:, 1:].max() < 0.65
    assert last[:, :-1].min() > 0.95
    area = result.area
    assert (area["evidence"] <= area["random"]).all()  # where that takes the patch first too, as soon
    assert area["evidence"].mean() < area["random"].mean()
    assert (area["random"] < area["last"]).all()
    summary = result.summary().set_index("order")
    assert summary.loc["evidence", "below random"] == pytest.approx((area["random"] - area["evidence"]).mean())
    assert summary.loc["last", "below random"] < 0
    assert summary.loc["random", ["below random", "confidence"]].tolist() == [0, 0]


def test_area_is_that_of_trapezia(model: VisionTransformer) -> None:
    result = deletion(model, images(), {"one": random_maps()}, steps=5)
    for order, name in enumerate(result.orders):
        for image in range(3):
            curve, at = result.probability[order, image], result.fractions
            expected = sum((curve[i] + curve[i + 1]) / 2 * (at[i + 1] - at[i]) for i in range(5))
            assert result.area[name][image] == pytest.approx(expected)


def test_other_libraries_classifiers_and_photographs() -> None:
    maps = random_maps(2, 4, 6)
    for name in ("timm", "timm-gap"):
        assert deletion(FAMILIES[name].model(), FAMILIES[name].images(2), {"one": maps}, steps=2).probability.shape == (2, 2, 3)
    torchvision = FAMILIES["torchvision"]
    assert deletion(torchvision.model(), torchvision.images(2), {"one": maps[:, :, :4]}, steps=2).probability.shape == (2, 2, 3)
    from transformers import ViTConfig, ViTForImageClassification

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=8)
    labelled = ViTForImageClassification(ViTConfig(**sizes, image_size=(32, 48), num_labels=5)).eval()
    assert deletion(labelled, images(32, 48, batch=2), {"one": maps}, steps=2).predicted.max() < 5
    own = classifier(2)
    own.preprocessing = Preprocessing((32, 32), resize=32)
    assert deletion(own, sample_photographs(2), {"one": random_maps(2, 4, 4)}, steps=2).names == ["china", "flower"]


def test_dataframe_save_and_plot(model: VisionTransformer, tmp_path: Path) -> None:
    result = deletion(model, images(), {"one": random_maps()}, steps=3)
    frame = result.to_dataframe()
    assert list(frame) == ["order", "image", "name", "predicted", "fraction", "probability"]
    assert len(frame) == 2 * 3 * 4
    one = frame[(frame.order == "random") & (frame.image == 2) & (frame.fraction == result.fractions[1])]
    assert one.probability.tolist() == [result.probability[1, 2, 1]]
    again = load_result(result.save(tmp_path / "deletion.safetensors"))
    assert isinstance(again, DeletionResult)
    np.testing.assert_array_equal(again.probability, result.probability)
    assert again.provenance["options"] == {"steps": 3, "seed": 0, "orders": ["one", "random"]}
    assert again.provenance["images"]["count"] == 3
    assert isinstance(again.plot(), Axes)


def test_patches_that_reach_over_the_edge_and_pixels_beyond_the_last() -> None:
    patches = np.array([[True, False, False, True]])
    for size in ((6, 6), (8, 8), (9, 10)):
        away = _pixels(patches, TokenGrid(2, 2, (4, 4), 1, True), torch.zeros(1, 3, *size))[0, 0].numpy()
        expected = np.zeros(size, dtype=bool)
        expected[:4, :4] = True
        expected[4:8, 4:8] = True
        np.testing.assert_array_equal(away, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        (
            {"maps": {"random": random_maps()}},
            "a map is called 'random', which is the name of the random order; give it another name",
        ),
        ({"maps": {"one": random_maps(3, 4, 3)}}, r"maps of one have shape \(3, 4, 3\); they must be \(image, 3, 4\)"),
        ({"maps": {"one": random_maps(2)}}, "got 2 maps of one for 3 images or more; pass one map per image"),
        ({"maps": {"one": random_maps(4)}}, "got 4 maps of one for 3 images or more; pass one map per image"),
        ({"maps": {"one": np.full((3, 3, 4), np.nan)}}, "maps of one contain values that are not finite"),
        ({"images": iter([images(batch=2)] * 2)}, "got 3 maps of one for 4 images or more; pass one map per image"),
        ({"images": iter([images(batch=2)])}, "got 3 maps of one for 2 images or more; pass one map per image"),
        (
            {"model": small_vit(num_classes=0)},
            "VisionTransformer does not return scores of classes; pass a model with a classif",
        ),
    ],
)
def test_errors_say_what_arrived(arguments: dict[str, Any], message: str, model: VisionTransformer) -> None:
    with pytest.raises(InputError, match=message):
        deletion(**({"model": model, "images": images(), "maps": {"one": random_maps()}} | arguments))


def test_a_librarys_model_that_returns_features() -> None:
    family = FAMILIES["transformers-vit"]
    with pytest.raises(InputError, match="ViTModel does not return scores of classes; pass a model with a classification head"):
        deletion(family.model(), family.images(), {})
