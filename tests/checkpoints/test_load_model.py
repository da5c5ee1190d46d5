"""What `load_model` accepts, our own models saved and loaded, and the errors for everything else."""

from __future__ import annotations

import json
import os
import re
import warnings
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints.parity import assert_same, images, randomize
from vit_probe.checkpoints import Checkpoint, load_model
from vit_probe.data.preprocessing import Preprocessing
from vit_probe.errors import AssumptionWarning, InputError, UnsupportedArchitecture
from vit_probe.models.config import ResNetConfig, ViTConfig
from vit_probe.models.vit import VisionTransformer
from vit_probe.results import weights_sha256

pytestmark = pytest.mark.filterwarnings("ignore::vit_probe.errors.AssumptionWarning")

TINY = ViTConfig(image_size=48, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=7)

OWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "no class token": ({"class_token": False, "pooling": "avg"}, {}),
    "no class token, pooled before the norm": ({"class_token": False, "pooling": "avg", "norm_pooled": True}, {}),
    "registers": ({"num_registers": 3, "position_prefix": 1}, {}),
    "distilled": ({"distillation_token": True, "pooling": "distilled"}, {}),
    "both pooled": ({"pooling": "token+avg"}, {}),
    "no positions": ({"position": "none"}, {"position": "none", "image_size": 48}),
    "rows and columns": ({"position": "learned_2d", "image_size": (32, 72)}, {}),
    "sines": ({"position": "sincos_2d"}, {"position": "sincos_2d"}),
    "relative positions": ({"position": "relative"}, {"position": "relative", "image_size": 48}),
    "rotary positions": ({"position": "rope_2d"}, {"position": "rope_2d", "image_size": 48}),
    "wider heads": ({"head_dim": 12}, {"head_dim": 12}),
    "qk norm, layer scale, SwiGLU": ({"qk_norm": True, "layer_scale": 0.1, "activation": "swiglu"}, {}),
    "pre-norm without patch bias": ({"pre_norm": True, "patch_bias": False, "norm_eps": 1e-5}, {}),
    "hybrid": ({"stem": ResNetConfig((1, 1), width=32), "patch_size": 1}, {}),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kind", OWN)
def test_state_dicts_of_our_own_models(kind: str, suffix: str, tmp_path: Path) -> None:
    changes, overrides = OWN[kind]
    model = randomize(VisionTransformer(replace(TINY, **changes)))
    path = tmp_path / f"own{suffix}"
    save_file(model.state_dict(), path) if suffix == ".safetensors" else torch.save(model.state_dict(), path)
    loaded = load_model(path, num_heads=4, **overrides)
    assert not loaded.training
    # A state dict does not hold LayerScale's initial value, which a trained model does not depend on.
    assert replace(loaded.config, layer_scale=model.config.layer_scale) == model.config
    for size in ((48, 48), (32, 72)):
        with torch.no_grad():
            assert_same(loaded(images(*size)), model(images(*size)), tolerance=1e-12)


def test_name_and_preprocessing(tmp_path: Path) -> None:
    save_file(VisionTransformer(TINY).state_dict(), tmp_path / "mine.safetensors")
    assert VisionTransformer(TINY).name == "VisionTransformer"
    with pytest.warns(AssumptionWarning, match=r"ImageNet's mean .* assumed, .*shorter side to 55 pixels and cutting 48 x 48 "):
        loaded = load_model(str(tmp_path / "mine.safetensors"), num_heads=4)
    assert loaded.name == "mine.safetensors"
    assert loaded.preprocessing == Preprocessing((48, 48), 55)
    save_file(VisionTransformer(replace(TINY, in_channels=2)).state_dict(), tmp_path / "two.safetensors")
    assert load_model(tmp_path / "two.safetensors", num_heads=4).preprocessing is None
    preprocessing = Preprocessing((48, 48), 55)
    assert Checkpoint(TINY, VisionTransformer(TINY).state_dict(), preprocessing).build().preprocessing is preprocessing


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(VisionTransformer(TINY).state_dict(), tmp_path / "mine.safetensors")
    assert load_model("~/mine.safetensors", num_heads=4).config == TINY


def test_zero_classes_leave_out_the_head() -> None:
    model = randomize(VisionTransformer(TINY))
    built = Checkpoint(replace(TINY, num_classes=0), model.state_dict(), None).build()
    with torch.no_grad():
        assert_same(built(images(48)), model.forward_features(images(48))[:, 0], tolerance=1e-12)


def test_an_override_that_is_not_a_field(tmp_path: Path) -> None:
    save_file(VisionTransformer(TINY).state_dict(), tmp_path / "mine.safetensors")
    with pytest.raises(InputError, match="ViTConfig has no field layers, size"):
        load_model(tmp_path / "mine.safetensors", size=3, layers=2)


def test_demo_is_the_bundled_model_even_next_to_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bundled = load_model("demo")
    assert bundled.name == "demo"
    (tmp_path / "demo").mkdir()
    assert weights_sha256(load_model("demo")) == weights_sha256(bundled)
    with pytest.raises(InputError, match=r"the folder demo holds no config\.json"):
        load_model("./demo")
    with pytest.raises(InputError, match=r"the folder demo holds no config\.json"):
        load_model(Path("demo"))
    assert load_model("demo", num_classes=0).config.num_classes == 0


def test_missing_files_and_configurations(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"no checkpoint file or folder .*nothing\.pth; pass .* one of demo, hf:ORG/NAME, timm:NAME, .*ARCH/TAG$",
    ):
        load_model(tmp_path / "nothing.pth")
    with pytest.raises(InputError, match=r"the folder .* holds no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InputError, match=r"holds no weights; expected model\.safetensors or pytorch_model\.bin"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"config\.json has neither a model_type, as transformers writes, nor timm's architecture"
    ):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="holds a JSON list instead of an object"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    save_file({"embeddings.LayerNorm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model_type is 'bert'; supported are vit, .*'bert' does not take images"):
        load_model(tmp_path)
    (tmp_path / "notes.txt").write_text("weights")
    with pytest.raises(
        InputError, match=r"notes\.txt has no known checkpoint format; pass a file that ends in \.npz, \.safetensors"
    ):
        load_model(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("value", "kind"), [(None, "NoneType"), (5, "int"), (b"demo", "bytes"), (torch.nn.Linear(1, 1), "Linear")]
)
def test_what_is_neither_name_nor_path(value: Any, kind: str) -> None:
    with pytest.raises(InputError, match=rf"^load_model takes a path or one of demo, .*; got {kind} \(a model in memory"):
        load_model(value)


@pytest.mark.parametrize(
    "name", ["a\0b", "x" * 5000, "/" + "y" * 300 + "/z.pth", "\udcff.pth", "~nobody-of-this-name/x.pth", ""]
)
def test_paths_that_no_file_can_have(name: str) -> None:
    with pytest.raises(InputError) as caught:
        load_model(name)
    assert len(str(caught.value)) < 600


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.pth"))
    try:
        with path.open("wb") as file:
            torch.save(VisionTransformer(TINY).state_dict(), file)
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    assert load_model(path, num_heads=4).name == "m\\udcff.pth"


def test_errors_for_unknown_layouts_name_the_supported_ones(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, tmp_path / "resnet.safetensors")
    message = (
        r"not a Vision Transformer with the parameter names of timm, transformers, torchvision or .*conv1\.weight, fc\.bias$"
    )
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "resnet.safetensors")
    torch.save({"model": {"epoch": 3}}, tmp_path / "empty.pt")
    with pytest.raises(InputError, match="holds no named parameters"):
        load_model(tmp_path / "empty.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(InputError, match="holds no named parameters"):
        load_model(tmp_path / "tensor.pt")


class Exploit:
    """Unpickling this runs a command."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_never_run(zipped: bool, tmp_path: Path) -> None:
    torch.save({"model": Exploit(tmp_path / "ran")}, tmp_path / "exploit.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        InputError,
        match=r"without running pickled code \((posix|nt)\.system\).*never done .*; save only the model's state_dict",
    ):
        load_model(tmp_path / "exploit.pt")
    torch.save(VisionTransformer(TINY), tmp_path / "module.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"pickled code \(vit_probe\.models\.vit\.VisionTransformer\)"):
        load_model(tmp_path / "module.pt")
    assert not (tmp_path / "ran").exists()


HOSTILE_METADATA = {
    "no JSON": "{oops", "a list": "[]", "null": "null", "a number": "5", "nothing": "", "no configuration": "{}",
    "a list as configuration": '{"config": [], "preprocessing": null}', "deep": "[" * 100_000 + "]" * 100_000,
    "long digits": '{"config": {"depth": ' + "9" * 5000 + '}, "preprocessing": null}',
}  # fmt: skip


@pytest.mark.parametrize("metadata", HOSTILE_METADATA.values(), ids=HOSTILE_METADATA.keys())
def test_hostile_metadata(metadata: str, tmp_path: Path) -> None:
    save_file(VisionTransformer(TINY).state_dict(), tmp_path / "own.safetensors", metadata={"vit_probe.model": metadata})
    with pytest.raises(InputError, match=r"^.*own\.safetensors cannot be loaded; it may be damaged, or its parts contradict"):
        load_model(tmp_path / "own.safetensors")


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("config", "depth", 10**9),
        ("config", "depth", "2"),
        ("config", "num_heads", True),
        ("config", "norm_eps", float("nan")),
        ("config", "mlp_ratio", -4),
        ("config", "qkv_bias", "no"),
        ("config", "image_size", [48, 48, 48]),
        ("config", "image_size", None),
        ("config", "stem", {"layers": [10**9], "width": 64}),
        ("config", "layers", 2),
        ("preprocessing", "size", [48]),
        ("preprocessing", "resize", "55"),
        ("preprocessing", "std", [0, 0, 0]),
        ("preprocessing", "mean", "abc"),
        ("preprocessing", "interpolation", "cubist"),
        ("preprocessing", "colour", "blue"),
    ],
)
def test_hostile_values_in_metadata(part: str, field: str, value: Any, tmp_path: Path) -> None:
    content: dict[str, Any] = {"config": asdict(TINY), "preprocessing": asdict(Preprocessing((48, 48), 55))}
    content[part][field] = value
    metadata = {"vit_probe.model": json.dumps(content)}
    save_file(VisionTransformer(TINY).state_dict(), tmp_path / "own.safetensors", metadata=metadata)
    with pytest.raises(InputError):
        load_model(tmp_path / "own.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"blocks.999999999.norm1.weight": torch.ones(32)},
        {f"blocks.{'9' * 5000}.norm1.weight": torch.ones(32)},
        {
            "patch_embed.backbone.stem.conv.weight": torch.ones(1, 3, 7, 7),
            "patch_embed.backbone.stages.99999999.a": torch.ones(1),
        },
        {"patch_embed.proj.weight": torch.tensor(1.0)},
        {"blocks.0.mlp.fc1.weight": torch.ones(0, 32), "blocks.0.mlp.fc2.weight": torch.ones(32, 0)},
        {"pos_embed": torch.ones(1, 0, 32)},
    ],
    ids=["block number", "long number", "stage number", "scalar", "empty", "no positions"],
)
def test_hostile_parameters(changes: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(VisionTransformer(TINY).state_dict() | changes, tmp_path / "hostile.pth")
    with pytest.raises(InputError):
        load_model(tmp_path / "hostile.pth", num_heads=4)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"model_type": "vit", "hidden_act": []}', '{"model_type": "v\\u0000"}', "\udcff"]
)
def test_hostile_configurations(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    save_file({"embeddings.patch_embeddings.projection.weight": torch.ones(2, 3, 4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError):
        load_model(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of Unix")
def test_named_pipes_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(InputError, match="is not a regular file"):
        load_model(tmp_path / "pipe.pth")
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load_model(tmp_path)


def test_a_training_checkpoint(tmp_path: Path) -> None:
    """The teacher's weights, its blocks in chunks, beside a head, a student, an optimiser and the program's options."""
    teacher, student = (randomize(VisionTransformer(replace(TINY, num_classes=0)), seed) for seed in (0, 1))
    chunked = {re.sub(r"^blocks\.(\d)", r"blocks.0.\1", name): value for name, value in teacher.state_dict().items()}
    content = {
        "student": {f"module.backbone.{name}": value for name, value in student.state_dict().items()},
        "teacher": {f"backbone.{name}": value for name, value in chunked.items()} | {"head.mlp.0.weight": torch.ones(2, 2)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "args": Namespace(output_dir=tmp_path),
    }
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    with pytest.warns(AssumptionWarning, match=r"several Vision Transformers .*; teacher\.backbone is taken"):
        loaded = load_model(tmp_path / "checkpoint.pth.tar", num_heads=4)
    with torch.no_grad():
        assert_same(loaded(images(48)), teacher(images(48)), tolerance=1e-12)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".npz"])
@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "halved"])
def test_damaged_files(suffix: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / f"damaged{suffix}"
    state = VisionTransformer(TINY).state_dict()
    if suffix == ".safetensors":
        save_file(state, path)
    elif suffix == ".npz":
        np.savez(path, **{name.replace(".", "/"): value.numpy() for name, value in state.items()})
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == ".pt")
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "garbage": b"hello world" * 50, "truncated": whole[:-100], "halved": whole[: len(whole) // 2]}[damage]
    )
    with pytest.raises(InputError, match=r"is not a|is damaged") as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_byte_in_an_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "bytes.npz", embedding=np.zeros(1000))
    content = bytearray((tmp_path / "bytes.npz").read_bytes())
    content[500] ^= 255
    (tmp_path / "bytes.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"bytes\.npz is damaged and cannot be read"):
        load_model(tmp_path / "bytes.npz")


def test_the_error_names_the_damaged_file_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    with pytest.raises(InputError, match=r"model\.safetensors is not a complete safetensors file"):
        load_model(tmp_path)


def test_parameters_that_are_not_finite(tmp_path: Path) -> None:
    model = VisionTransformer(TINY)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[0, 0] = torch.nan
    save_file(model.state_dict(), tmp_path / "diverged.safetensors")
    with pytest.raises(InputError, match=r"holds NaN or infinity .* in blocks\.0\.attn\.qkv\.weight"):
        load_model(tmp_path / "diverged.safetensors", num_heads=4)


def test_a_warning_states_the_assumed_number_of_heads(tmp_path: Path) -> None:
    config = replace(TINY, embed_dim=192, num_heads=3)
    save_file(VisionTransformer(config).state_dict(), tmp_path / "bare.safetensors")
    with pytest.warns(AssumptionWarning, match="3 are assumed, as in published models of width 192"):
        load_model(tmp_path / "bare.safetensors")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AssumptionWarning)
        load_model(tmp_path / "bare.safetensors", num_heads=3)
    assert not [warning for warning in caught if "heads" in str(warning.message)]


def test_the_architecture_stated_beside_the_model_goes_before_the_files_name(tmp_path: Path) -> None:
    state = VisionTransformer(replace(TINY, embed_dim=768, num_heads=16)).state_dict()
    torch.save({"arch": "vit_base_patch16_gap_224", "state_dict": state}, tmp_path / "vit_base_patch16_224.pth")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*attention heads")
        assert load_model(tmp_path / "vit_base_patch16_224.pth").config.num_heads == 16


def test_messages_name_what_cannot_be_found_and_hold_no_control_characters(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the model's name is empty; pass a path, or one of demo"):
        load_model("")
    with pytest.raises(InputError, match=r"no checkpoint ~nobody-of-this-name/x\.pth: ~nobody-of-this-name is no user's home"):
        load_model("~nobody-of-this-name/x.pth")
    torch.save(VisionTransformer(TINY).state_dict() | {"a\x1b[1m\nb": torch.ones(1)}, tmp_path / "c.pth")
    with pytest.raises(UnsupportedArchitecture, match=r"unexpected: a\\x1b\[1m\\nb$"):
        load_model(tmp_path / "c.pth", num_heads=4)
