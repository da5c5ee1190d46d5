"""A measure in one file outside the package: defined, run on the bundled model and plotted, in at most 25 lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

FILES = {
    "offset_measure": '''\
"""How far heads attend upwards."""

import torch

import vit_probe as vp


@vp.offset_measure(unit="pixels", reference="a test")
def upward_reach(dx, dy, *, least: float = 0.0):
    """Attention-weighted distance upwards.

    Args:
        least: Offsets of fewer pixels do not count.
    """
    return torch.where(-dy >= least, -dy, 0).clamp_min(0)


result = upward_reach(vp.load_model("demo"), torch.rand(2, 3, 64, 64), least=9.0)
result.plot(spread=True).figure.savefig("picture.png")
print(result.summary().to_string())
print(vp.load_result(result.save("result.safetensors")).options)
''',
    "head_measure": '''\
"""How many patches get half of the attention."""

import torch

import vit_probe as vp


@vp.head_measure(unit="patches", reference="a test")
def patches_with_half(attention: vp.PatchAttention):
    """Number of patches, the most attended first, that together get half of each query's attention on patches."""
    weights = attention.to_patches.sort(dim=-1, descending=True).values
    needed = (weights.cumsum(dim=-1) < weights.sum(dim=-1, keepdim=True) / 2).sum(dim=-1) + 1
    return {"patches": needed, "patch_mass": attention.to_patches.sum(dim=-1)}


model, images = vp.load_model("demo"), torch.rand(2, 3, 64, 64)
result, entropy = vp.measure(model, images, [patches_with_half, vp.attention_entropy], per_image=True)
result.plot().figure.savefig("picture.png")
print(result.summary().to_string())
print(vp.load_result(result.save("result.safetensors")).options)
''',
}


@pytest.mark.parametrize("decorator", FILES)
def test_a_measure_in_one_file(decorator: str, tmp_path: Path) -> None:
    source = FILES[decorator]
    assert len(source.splitlines()) <= 25
    (tmp_path / "own_measure.py").write_text(source, encoding="utf-8")
    done = subprocess.run([sys.executable, "own_measure.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    header, *layers, options = done.stdout.splitlines()
    assert {"offset_measure": "mean upward reach (pixels)", "head_measure": "mean patches (patches)"}[decorator] in header
    assert len(layers) == 9
    assert (
        options
        == {
            "offset_measure": "{'least': 9.0, 'prefix': 'renormalize'}",
            "head_measure": "{'per_image': True}",
        }[decorator]
    )
    picture = imread(tmp_path / "picture.png")
    assert min(picture.shape[:2]) > 100
    assert np.ptp(picture[..., :3]) > 0.5
