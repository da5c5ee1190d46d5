"""Saving and reading results, and where their numbers come from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn

from tests.measures.tiles import arrays_of
from vit_probe import InputError, VisionTransformer, ViTConfig, attention_rollout, load_result, mean_attention_distance
from vit_probe.measures import AttentionRolloutResult
from vit_probe.measures.base.discovery import measure_files
from vit_probe.measures.base.per_head import HeadResult
from vit_probe.measures.base.registry import registered
from vit_probe.results import GenericResult, software_versions, weights_sha256

NOT_MEASURES = [
    "os.path",
    "this",
    "antigravity",
    "../x",
    "base",
    "__init__",
    "base.registry",
    "token_norms.py",
    "",
    3,
    None,
    ["os"],
]


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(ViTConfig(image_size=(16, 24), patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0))


@pytest.fixture(scope="module")
def distance(model: VisionTransformer) -> HeadResult:
    return mean_attention_distance(model, torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(1)))


def test_a_saved_result_equals_the_one_that_was_saved(distance: HeadResult, tmp_path: Path) -> None:
    path = distance.save(tmp_path / "distance.safetensors")
    again = load_result(path)
    assert isinstance(again, HeadResult)
    assert list(arrays_of(again)) == list(arrays_of(distance))
    for name, values in arrays_of(distance).items():
        np.testing.assert_array_equal(arrays_of(again)[name], values, err_msg=name)
    assert again.measure == distance.measure == "attention_distance"
    assert again.provenance == distance.provenance
    assert (again.modules, again.num_images, again.options) == (distance.modules, 3, {"prefix": "renormalize"})
    assert (again.unit, again.label) == ("pixels", distance.label)
    assert again.to_dataframe().equals(distance.to_dataframe())


def test_a_result_without_photographs_comes_back_without(model: VisionTransformer, tmp_path: Path) -> None:
    result = attention_rollout(model, torch.rand(2, 3, 16, 24))
    again = load_result(result.save(tmp_path / "rollout.safetensors"))
    assert isinstance(again, AttentionRolloutResult)
    assert again.images is None
    assert again.names == ["image 0", "image 1"]


def test_the_same_result_gives_the_same_bytes(distance: HeadResult, tmp_path: Path) -> None:
    one, two = (distance.save(tmp_path / name).read_bytes() for name in ("one", "two"))
    assert one == two


def test_provenance(distance: HeadResult, model: VisionTransformer) -> None:
    provenance = distance.provenance
    assert provenance["model"]["weights_sha256"] == weights_sha256(model)
    assert provenance["model"]["config"]["embed_dim"] == 16
    assert provenance["images"]["count"] == 3
    grid = {"rows": 2, "cols": 3, "patch_size": [8, 8], "num_prefix_tokens": 1, "has_cls_token": True}
    assert provenance["grid"] == grid | {"class_token": 0, "num_suffix_tokens": 0}
    assert provenance["layers"] == ["blocks.0.attn", "blocks.1.attn"]
    assert provenance["options"] == {"prefix": "renormalize"}
    assert provenance["versions"] == software_versions()
    assert provenance["versions"]["torch"] == version("torch")


def test_the_hash_follows_the_weights(model: VisionTransformer) -> None:
    before = weights_sha256(model)
    assert weights_sha256(model) == before
    with torch.no_grad():
        model.cls_token += 1e-3
        changed = weights_sha256(model)
        model.cls_token -= 1e-3
    assert changed != before


def test_the_hash_covers_state_of_every_kind() -> None:
    class Odd(nn.Module):
        def __init__(self, extra: str = "a", imaginary: float = 2.0, scale: float = 0.5) -> None:
            super().__init__()
            self.extra = extra, torch.quantize_per_tensor(torch.eye(2), scale, 0, torch.qint8), None  # as quantised layers pack
            self.register_buffer("complex", torch.tensor([1 + imaginary * 1j]).conj())
            self.register_buffer("sparse", torch.eye(2).to_sparse())
            self.register_buffer("narrow", torch.ones((), dtype=torch.bfloat16))

        def get_extra_state(self) -> tuple[Any, ...]:
            return self.extra

    assert weights_sha256(Odd()) == weights_sha256(Odd())
    others = [{}, {"extra": "b"}, {"imaginary": -2.0}, {"scale": 0.3}]
    assert len({weights_sha256(Odd(**options)) for options in others}) == 4


def test_an_interrupted_write_leaves_the_old_file(
    distance: HeadResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

    @pytest.mark.parametrize("description", ["{", "[]", "{}", '{"type": "HeadResult"}', '{"type": "HeadResult", "values": []}'])
    def test_a_damaged_description(self, description: str, tmp_path: Path) -> None:
        save_file({"a": np.zeros(2)}, tmp_path / "damaged", metadata={"vit_probe": description})
        with pytest.raises(InputError, match="damaged is not a saved result: its description is damaged"):
            load_result(tmp_path / "damaged")

    def test_other_fields_than_this_version_has(self, distance: HeadResult, tmp_path: Path) -> None:
        path = rewritten(distance.save(tmp_path / "distance"), measure="rollout")
        with pytest.raises(
            InputError, match=r"is not a result of rollout as this version writes it: .*maps.* differ; measure again"
        ):
            load_result(path)
        path = rewritten(distance.save(tmp_path / "distance"), colour="red")
        with pytest.raises(InputError, match="not a result of attention_distance as this version writes it: colour differ"):
            load_result(path)

    @pytest.mark.parametrize(
        "path",
        ["FOLDER", "FOLDER/pipe", "", "x" * 300, "a\0b", None, 3, ["a"], b"bytes", "/dev/null", "FOLDER/deep", "FOLDER/cut"],
    )
    def test_no_readable_file(self, distance: HeadResult, path: Any, tmp_path: Path) -> None:
        if hasattr(os, "mkfifo"):
            os.mkfifo(tmp_path / "pipe")
        save_file({"a": np.zeros(2)}, tmp_path / "deep", metadata={"vit_probe": "[" * 100_000 + "]" * 100_000})
        (tmp_path / "cut").write_bytes(distance.save(tmp_path / "whole").read_bytes()[:-1])
        with pytest.raises(
            InputError, match=r"there is no result file|is not a saved result|is not a regular file|path of the file"
        ):
            load_result(path.replace("FOLDER", str(tmp_path)) if isinstance(path, str) else path)

    @pytest.mark.parametrize(
        ("values", "named"),
        [
            ({"modules": []}, "modules is"),
            ({"modules": "ab"}, "modules is 'ab'"),
            ({"modules": [1, 2]}, r"modules is \[1, 2\]"),
            ({"values": {"arrays": []}}, "values of shapes {}"),
            ({"values": {"distance": 1}}, "no attribute 'shape'"),
            ({"std": {"arrays": ["distance"]}}, "do not fit standard deviations"),
            ({"num_images": "3"}, "num_images is '3'"),
            ({"num_images": -3}, "num_images is -3"),
            ({"num_images": True}, "num_images is True"),
            ({"num_images": 10**40}, "num_images is 1000"),
            ({"names": ["a"]}, "with 1 names"),
            ({"unit": None}, "unit is None"),
            ({"options": []}, r"options is \[\]"),
            ({"provenance": "x"}, "provenance is 'x'|no attribute"),
            ({"provenance": {"skipped": "x"}}, "provenance has skipped 'x'"),
            ({"uniform": {}}, "uniform attention has values of nothing, but not of distance"),
            ({"num_windows": [1, 1]}, r"num_windows is \[1, 1\]"),
        ],
    )
    def test_plain_values_of_another_type(
        self, distance: HeadResult, values: dict[str, Any], named: str, tmp_path: Path
    ) -> None:
        path = rewritten(distance.save(tmp_path / "distance"), **values)
        with pytest.raises(InputError, match=rf"distance is damaged \(.*{named}.*\); measure again"):
            load_result(path)

    @pytest.mark.parametrize("change", ["shorter", "longer", "one axis more", "integers", "missing"])
    @pytest.mark.parametrize("array", ["values/distance", "std/distance", "num_windows", "uniform/distance"])
    def test_arrays_that_do_not_fit_the_others(self, distance: HeadResult, array: str, change: str, tmp_path: Path) -> None:
        path = distance.save(tmp_path / "distance")
        with safe_open(path, framework="numpy") as file:
            arrays, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        value = arrays.pop(array)
        if change != "missing":
            other = np.float32 if value.dtype.kind == "i" else np.int32
            changes = {"shorter": value[:-1], "longer": np.r_[value, value], "one axis more": value[None]}
            arrays[array] = changes[change] if change in changes else value.astype(other)
        save_file(arrays, path, metadata)
        with pytest.raises(InputError, match=r"distance is (damaged|not a)"):
            load_result(path)

    def test_a_path_of_another_type(self) -> None:
        with pytest.raises(InputError, match=r"from the path of the file that its save\(\) wrote, got None; pass that"):
            load_result(None)  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["attention_distance", "token_similarity", "representation_similarity"])
    def test_values_that_are_nan_throughout(self, model: VisionTransformer, name: str, tmp_path: Path) -> None:
        path = registered()[name].function(model, torch.rand(5, 3, 16, 24)).save(tmp_path / "result")
        with safe_open(path, framework="numpy") as file:
            arrays, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        spoilt = {key: value * np.nan if key.startswith(("values/", "similarity")) else value for key, value in arrays.items()}
        save_file(spoilt, path, metadata)
        with pytest.raises(InputError, match=r"result is damaged \(.*NaN.*\); measure again"):
            load_result(path)

    @pytest.mark.parametrize("name", [name for name, one in measure_files().items()])
    def test_the_results_of_every_measure_pass(self, model: VisionTransformer, name: str, tmp_path: Path) -> None:
        spec = registered()[name]
        options = {"per_image": True} if "per_image" in spec.options else {}
        pictures = torch.rand(5, 3, 16, 24, generator=torch.Generator().manual_seed(1))
        result = spec.function(model, pictures, **options) if spec.start else spec.function(model)
        assert type(load_result(result.save(tmp_path / "result"))) is type(result)

    @pytest.mark.parametrize("name", NOT_MEASURES)
    def test_nothing_that_a_file_names_is_imported(self, distance: HeadResult, name: object, tmp_path: Path) -> None:
        """Neither by the measure's name nor by that of the class; the result of an unknown measure has a general type."""
        before = set(sys.modules)
        path = distance.save(tmp_path / "distance")
        as_heads = load_result(rewritten(path, measure=name))
        of_own_class = load_result(rewritten(path, kind=f"{name}.Result"))
        generic = load_result(rewritten(path, more=1))
        assert {module for module in set(sys.modules) - before if not module.startswith("vit_probe.measures.base.")} == set()
        for heads in (as_heads, of_own_class):
            assert type(heads) is HeadResult
            assert heads.measure == str(name)
            assert heads.to_dataframe().equals(distance.to_dataframe())
        assert type(generic) is GenericResult
        assert generic.measure == str(name)
        assert generic.provenance == distance.provenance
        assert generic.contents["more"] == 1
        np.testing.assert_array_equal(generic.contents["values"]["distance"], distance.distance)
        assert set(generic.summary()["name"]) == set(generic.contents)
        with pytest.raises(InputError, match=r"this installation does not know the measure .*, and cannot draw its result"):
            generic.plot()

    @pytest.mark.parametrize(
        ("name", "modules"),
        [
            ("attention_distance", ["attention_distance"]),
            ("token_similarity", ["token_similarity"]),
            ("rollout", ["map_statistics", "rollout", "rollout_algorithms"]),
            ("unknown", []),
        ],
    )
    def test_only_the_module_of_the_measure_is_imported(
        self, model: VisionTransformer, name: str, modules: list[str], tmp_path: Path
    ) -> None:
        measure = registered().get(name) or registered()["attention_distance"]
        path = measure.function(model, torch.rand(2, 3, 16, 24)).save(tmp_path / "result")
        if name == "unknown":
            rewritten(path, measure=name)
        program = f"""
import sys, vit_probe
print(type(vit_probe.load_result({str(path)!r})).__name__)
print(*sorted(name.split(".")[2] for name in sys.modules if name.startswith("vit_probe.measures.") and ".base" not in name))
assert "matplotlib" not in sys.modules
"""
        shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.splitlines()
        assert shown == [measure.result.__name__, " ".join(modules)]


def rewritten(path: Path, *, kind: str | None = None, **values: object) -> Path:
    """Replace the name of the class, or some of the plain values, in a saved result."""
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        content = json.loads(file.metadata()["vit_probe"])
    content["type"] = kind or content["type"]
    content["values"] |= values
    save_file(arrays, path, metadata={"vit_probe": json.dumps(content)})
    return path


def test_repr_shows_shapes_on_one_line(distance: HeadResult) -> None:
    shown = repr(distance)
    assert shown.startswith("HeadResult(measure='attention_distance', unit='pixels', label=")
    assert "values={'distance': (2, 2), 'patch_mass': (2, 2)" in shown
    assert "uniform={'distance': (2,)}" in shown
    assert "sha256" not in shown
    assert "\n" not in shown
