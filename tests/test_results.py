"""Saving and reading results, and where their numbers come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from vit_probe import InputError, VisionTransformer, ViTConfig, attention_rollout, load_result, mean_attention_distance
from vit_probe.measures import AttentionDistanceResult, AttentionRolloutResult
from vit_probe.results import software_versions, weights_sha256


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(ViTConfig(image_size=(16, 24), patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0))


@pytest.fixture(scope="module")
def distance(model: VisionTransformer) -> AttentionDistanceResult:
    return mean_attention_distance(model, torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(1)))


def test_a_saved_result_equals_the_one_that_was_saved(distance: AttentionDistanceResult, tmp_path: Path) -> None:
    path = distance.save(tmp_path / "distance.safetensors")
    again = AttentionDistanceResult.load(path)
    for name in ("distance", "std", "confidence", "patch_mass", "uniform_distance", "num_windows"):
        np.testing.assert_array_equal(getattr(again, name), getattr(distance, name))
    assert again.provenance == distance.provenance
    assert (again.modules, again.num_images, again.prefix) == (distance.modules, 3, "renormalize")
    assert again.to_dataframe().equals(distance.to_dataframe())


def test_a_result_without_photographs_comes_back_without(model: VisionTransformer, tmp_path: Path) -> None:
    result = attention_rollout(model, torch.rand(2, 3, 16, 24))
    again = load_result(result.save(tmp_path / "rollout.safetensors"))
    assert isinstance(again, AttentionRolloutResult)
    assert again.images is None
    assert again.names == ["image 0", "image 1"]


def test_the_same_result_gives_the_same_bytes(distance: AttentionDistanceResult, tmp_path: Path) -> None:
    one, two = (distance.save(tmp_path / name).read_bytes() for name in ("one", "two"))
    assert one == two


def test_provenance(distance: AttentionDistanceResult, model: VisionTransformer) -> None:
    provenance = distance.provenance
    assert provenance["model"]["weights_sha256"] == weights_sha256(model)
    assert provenance["model"]["config"]["embed_dim"] == 16
    assert provenance["images"]["count"] == 3
    assert provenance["grid"] == {"rows": 2, "cols": 3, "patch_size": [8, 8], "num_prefix_tokens": 1, "has_cls_token": True}
    assert provenance["layers"] == ["blocks.0.attn", "blocks.1.attn"]
    assert provenance["options"] == {"prefix": "renormalize"}
    assert provenance["versions"] == software_versions()
    assert provenance["versions"]["torch"] == torch.__version__


def test_the_hash_follows_the_weights(model: VisionTransformer) -> None:
    before = weights_sha256(model)
    assert weights_sha256(model) == before
    with torch.no_grad():
        model.cls_token += 1e-3
        changed = weights_sha256(model)
        model.cls_token -= 1e-3
    assert changed != before


def test_a_broken_off_write_leaves_the_old_file(
    distance: AttentionDistanceResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = distance.save(tmp_path / "distance.safetensors")
    before = path.read_bytes()

    def fail(*names: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vit_probe.atomic_io.os.replace", fail)
    with pytest.raises(InputError, match=r"cannot write .*No space left on device"):
        distance.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["distance.safetensors"]


class TestLoadResult:
    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"there is no result file .*nothing"):
            load_result(tmp_path / "nothing")

    def test_no_safetensors(self, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("hello")
        with pytest.raises(InputError, match="is not a saved result"):
            load_result(tmp_path / "text")

    def test_other_safetensors(self, tmp_path: Path) -> None:
        save_file({"a": np.zeros(2)}, tmp_path / "weights.safetensors")
        with pytest.raises(InputError, match="a safetensors file, but not a saved result of vit_probe"):
            load_result(tmp_path / "weights.safetensors")

    def test_another_kind(self, distance: AttentionDistanceResult, tmp_path: Path) -> None:
        path = distance.save(tmp_path / "distance")
        with pytest.raises(InputError, match="holds a AttentionDistanceResult, not a AttentionRolloutResult"):
            AttentionRolloutResult.load(path)


def test_a_result_introduces_itself_in_a_line(distance: AttentionDistanceResult) -> None:
    shapes = "distance=(2, 2), std=(2, 2), confidence=(2, 2), patch_mass=(2, 2)"
    assert repr(distance).startswith(f"AttentionDistanceResult({shapes}, uniform_distance=")
    assert "sha256" not in repr(distance)
