"""AttentionRun: images of every kind through a model, and the model afterwards as before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vit_probe.runner.run
from tests.example_models import FAMILIES, Assemble, Hungry, images, small_vit
from vit_probe import InputError, Preprocessing, TokenGrid, attention_rollout, mean_attention_distance
from vit_probe.errors import AssumptionWarning
from vit_probe.measures.base.discovery import measure_files
from vit_probe.measures.base.registry import registered
from vit_probe.measures.rollout import AttentionRollout
from vit_probe.measures.rollout_algorithms import RightToLeft
from vit_probe.results import weights_sha256
from vit_probe.runner.resume import write_state
from vit_probe.runner.run import AttentionRun, model_provenance, select_device

PREPARE = Preprocessing(size=(24, 24), resize=28, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def run(model: nn.Module, pictures: Any, **options: Any) -> AttentionRun:
    return AttentionRun(model, pictures, device="cpu", **options)


def measured(model: nn.Module, pictures: Any, **options: Any) -> np.ndarray:
    return mean_attention_distance(model, pictures, device="cpu", **options).distance


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)) for i in range(5)]


@pytest.fixture(scope="module")
def folder(photographs: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photographs")
    for index, photograph in enumerate(photographs):
        photograph.save(path / f"{index}.png")
    return path


def _batches(x: Tensor, size: int) -> Iterator[Tensor]:
    return (x[start : start + size] for start in range(0, len(x), size))


# The same numbers from images of every kind

KINDS: dict[str, Callable[[list[Image.Image], Path, Tensor], Any]] = {
    "tensor": lambda pictures, folder, x: x,
    "photographs": lambda pictures, folder, x: pictures,
    "tuple of photographs": lambda pictures, folder, x: tuple(pictures),
    "paths": lambda pictures, folder, x: sorted(folder.iterdir()),
    "strings": lambda pictures, folder, x: [str(path) for path in sorted(folder.iterdir())],
    "folder": lambda pictures, folder, x: folder,
    "list of batches": lambda pictures, folder, x: list(_batches(x, 3)),
    "generator": lambda pictures, folder, x: _batches(x, 4),
    "labelled loader": lambda pictures, folder, x: DataLoader(TensorDataset(x, torch.arange(5)), batch_size=2),
    "list of labelled batches": lambda pictures, folder, x: [(x[:1], 7), [x[1:], 8]],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_images_of_every_kind(kind: str, batch_size: int, photographs: list[Image.Image], folder: Path) -> None:
    x = torch.stack([PREPARE(photograph) for photograph in photographs])
    pictures = KINDS[kind](photographs, folder, x)
    result = mean_attention_distance(small_vit(), pictures, preprocessing=PREPARE, batch_size=batch_size, device="cpu")
    assert result.num_images == 5
    expected = mean_attention_distance.observer(small_vit().token_grid(24, 24))
    run(small_vit(), x).observe(expected)
    np.testing.assert_allclose(result.distance, expected.compute().distance, rtol=1e-6)
    np.testing.assert_allclose(result.std["distance"], expected.compute().std["distance"], rtol=1e-4)
    kept = attention_rollout(small_vit(), KINDS[kind](photographs, folder, x), preprocessing=PREPARE, device="cpu").images
    np.testing.assert_array_equal(kept, [np.asarray(PREPARE.crop(photograph)) for photograph in photographs])


def test_one_photograph(photographs: list[Image.Image], folder: Path) -> None:
    expected = measured(small_vit(), PREPARE(photographs[0])[None])
    for picture in (photographs[0], folder / "0.png", str(folder / "0.png")):
        np.testing.assert_allclose(measured(small_vit(), picture, preprocessing=PREPARE), expected, rtol=1e-6)


def test_the_models_own_preprocessing_is_used(photographs: list[Image.Image]) -> None:
    model = small_vit()
    model.preprocessing = PREPARE
    expected = measured(small_vit(), photographs, preprocessing=PREPARE)
    np.testing.assert_array_equal(measured(model, photographs), expected)
    other = Preprocessing(size=(24, 24), resize=24)
    assert abs(measured(model, photographs, preprocessing=other) - expected).max() > 1e-4


# One pass for several measures, and no further than it must


def test_several_measures_in_one_pass() -> None:
    model, x = small_vit(), images(batch=5)
    grid = model.token_grid(24, 24)
    together = [
        mean_attention_distance.observer(grid),
        mean_attention_distance.observer(grid, prefix="drop"),
        AttentionRollout(grid),
    ]
    run(model, x, batch_size=2).observe(*together)
    np.testing.assert_array_equal(together[0].compute().distance, measured(model, x, batch_size=2))
    np.testing.assert_array_equal(together[1].compute().distance, measured(model, x, batch_size=2, prefix="drop"))
    np.testing.assert_array_equal(together[2].compute().maps, attention_rollout(model, x, batch_size=2, device="cpu").maps)


@pytest.mark.parametrize("name", ["ours", "timm-registers", "transformers-dinov2", "torchvision", "encoder"])
def test_batches_stop_early_and_change_nothing(name: str) -> None:
    model, x = FAMILIES[name].model(), FAMILIES[name].images(5)
    calls = {"last": 0, "first": 0}
    modules = [module for module in model.modules() if isinstance(module, nn.LayerNorm | nn.Linear)]

    def counter(key: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            calls[key] += 1

        return count

    with torch.no_grad():
        order: list[nn.Module] = []
        handles = [module.register_forward_hook(lambda module, *_: order.append(module)) for module in modules]
        model(x[:1])
        for handle in handles:
            handle.remove()
    order[0].register_forward_hook(counter("first"))
    order[-1].register_forward_hook(counter("last"))
    seen, whole = Assemble(), Assemble()
    attention = run(model, x, batch_size=1)
    assert calls["last"] <= 2  # of what finds the tokens: the first pass, and one for what the output depends on
    calls.update(first=0, last=0)
    attention.observe(seen)
    assert calls == {"first": 5, "last": 0}
    run(model, x, batch_size=5).observe(whole)
    np.testing.assert_allclose(seen.attention()[:, 0], whole.attention()[:, 4], atol=1e-6)
    assert [tile.layer for tile in seen.tiles] == [0, 1] * 5


class Crossing(nn.Module):
    """Attends from one query to all tokens, which is not self-attention."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x[:, None, :1], x[:, None], x[:, None])[:, 0]


def test_other_attention_that_comes_in_later_is_refused() -> None:
    class Later(nn.Module):
        """Adds cross-attention where there are three images."""

        def __init__(self) -> None:
            super().__init__()
            self.patch_embed, self.crossing, self.layer = nn.Conv2d(3, 16, 8, 8), Crossing(), Layer()

        def forward(self, x: Tensor) -> Tensor:
            x = self.patch_embed(x).flatten(2).mT
            x = x + self.crossing(x) if len(x) == 3 else x
            return x + self.layer(x)

    measure = mean_attention_distance.observer(TokenGrid(3, 3, (8, 8), 0, False))
    run(Later(), images(batch=4), batch_size=2).observe(measure)
    assert measure.compute().num_images == 4
    with pytest.raises(
        InputError, match=r"Later attends differently in this batch.*'crossing': '1 query for 9 keys'.* skipped"
    ):
        run(Later(), images(batch=3), batch_size=3).observe(measure)


@pytest.mark.parametrize("name", [name for name, one in measure_files().items() if one.takes_images])
def test_a_run_that_was_complete_is_resumed(name: str, tmp_path: Path) -> None:
    spec, x = registered()[name], images(batch=5)
    assert spec.start is not None
    tables = []
    for _ in range(2):  # the second one finds all images done
        attention = run(small_vit(), x, batch_size=5)
        measure = spec.start(attention, **spec.options)
        attention.observe(measure, state=tmp_path / "state")
        tables.append(attention.result(measure).to_dataframe())
    pd.testing.assert_frame_equal(*tables)


def test_the_state_is_written_every_so_many_batches_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def write(path: Path, identity: Any, state: Any) -> Path:
        written.append(len(state.images["names"]))
        return write_state(path, identity, state)

    monkeypatch.setattr(vit_probe.runner.run, "write_state", write)
    attention = run(small_vit(), images(batch=13), batch_size=2)
    attention.observe(mean_attention_distance.observer(attention.grid), state=tmp_path / "state", every=2)
    assert written == [4, 8, 12, 13]


@pytest.mark.parametrize("name", ["attention_distance", "rollout", "class_attention", "token_norms", "token_similarity"])
def test_numbers_that_are_not_finite_end_the_run_at_their_batch(name: str, tmp_path: Path) -> None:
    """Not at the end of all images, and what came before stays in the state."""
    spec, x = registered()[name], images(batch=20)
    x[3] = 3e38  # overflows in the model
    assert spec.start is not None
    attention = run(small_vit(), x, batch_size=1)
    batches: list[int] = []
    with pytest.raises(InputError, match=r"not (all )?finite"):
        attention.observe(spec.start(attention, **spec.options), progress=batches.append, state=tmp_path / "state", every=2)
    assert batches == [1, 1, 1]
    with safe_open(tmp_path / "state", framework="numpy") as file:
        assert '"names": ["image 0", "image 1"]' in file.metadata()["vit_probe_state"]


def test_attention_that_changes_from_batch_to_batch_is_refused() -> None:
    class Fickle(nn.Module):
        """Passes the images by its first layer where there are three of them."""

        def __init__(self) -> None:
            super().__init__()
            self.patch_embed, self.first, self.second = nn.Conv2d(3, 16, 8, 8), Layer(), Layer()

        def forward(self, x: Tensor) -> Tensor:
            x = self.patch_embed(x).flatten(2).mT
            x = x if len(x) == 3 else x + self.first(x)
            return x + self.second(x)

    measure = mean_attention_distance.observer(TokenGrid(3, 3, (8, 8), 0, False))
    run(Fickle(), images(batch=4), batch_size=2).observe(measure)
    assert measure.compute().num_images == 4
    with pytest.raises(
        InputError, match=r"Fickle attends differently in this batch than before: its layers were \['first', 'sec"
    ):
        run(Fickle(), images(batch=3), batch_size=3).observe(measure)


class Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


def test_positions_are_no_second_sequence() -> None:
    """Rotary tables (head, token, dim) look like tokens where a batch has as many images as a layer has heads."""
    import timm

    sizes = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, class_token=False, global_pool="avg")
    model = timm.create_model("vit_small_patch16_rope_mixed_224", **sizes).eval()
    result = mean_attention_distance(model, images(32, 32, batch=5), batch_size=2, device="cpu")
    assert result.num_images == 5
    assert result.modules == ["blocks.0.attn", "blocks.1.attn"]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_what_memory_does_not_hold_is_halved_and_said_once(error: RuntimeError) -> None:
    x = images(batch=19)
    model = Hungry(2, error)
    attention = run(model, x, batch_size=8)
    model.sizes.clear()
    measures = [mean_attention_distance.observer(attention.grid), AttentionRollout(attention.grid)]
    with pytest.warns(
        AssumptionWarning, match="out of memory with a batch of 8 images; continuing with smaller batches"
    ) as said:
        attention.observe(*measures)
    assert len(said) == 1
    assert model.sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1]
    expected = measured(small_vit(), x)
    np.testing.assert_allclose(measures[0].compute().distance, expected, rtol=1e-6)
    maps = attention_rollout(small_vit(), x, device="cpu").maps
    np.testing.assert_allclose(measures[1].compute().maps, maps, rtol=1e-5)


def test_what_is_put_off_to_the_end_of_a_batch_is_halved_too(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(batch=8)
    expected = attention_rollout(small_vit(), x, device="cpu").maps
    rows = RightToLeft.rows

    def hungry(self: RightToLeft, weights: Tensor) -> list[Tensor]:
        if len(self.reached) > 3:
            raise OUT_OF_MEMORY[0]
        return rows(self, weights)

    monkeypatch.setattr(RightToLeft, "rows", hungry)
    monkeypatch.setattr("vit_probe.measures.rollout.cheapest_algorithm", lambda inputs: "recomputed")
    attention = run(small_vit(), x, batch_size=8)
    distance, rollout = mean_attention_distance.observer(attention.grid), AttentionRollout(attention.grid)
    with pytest.warns(AssumptionWarning, match="out of memory with a batch of 8 images"):
        attention.observe(distance, rollout)
    np.testing.assert_allclose(rollout.compute().maps, expected, rtol=1e-5)
    assert distance.compute().num_images == 8


def test_memory_that_does_not_hold_one_image_ends_the_run() -> None:
    model = Hungry(10, OUT_OF_MEMORY[0])
    attention = run(model, images())
    model.most = 0
    with pytest.warns(AssumptionWarning), pytest.raises(torch.OutOfMemoryError):
        attention.observe(mean_attention_distance.observer(attention.grid))
    with pytest.raises(torch.OutOfMemoryError):  # an observer that cannot take a batch back
        run(model, images()).observe(Assemble())


def test_other_errors_of_the_model_are_its_own() -> None:
    model = Hungry(10, RuntimeError("broken"))
    attention = run(model, images())
    model.most = 0
    with pytest.raises(RuntimeError, match="broken"):
        attention.observe(mean_attention_distance.observer(attention.grid))


def test_progress_is_told_the_images_of_each_batch() -> None:
    told: list[int] = []
    run(small_vit(), images(batch=5), batch_size=2).observe(Assemble(), progress=told.append)
    assert told == [2, 2, 1]


def test_layers_and_skipped_are_listed() -> None:
    from timm.models.vision_transformer import VisionTransformer

    sizes = dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    pooled = VisionTransformer(**sizes, class_token=False, global_pool="map")
    attention = run(pooled, images(16, 16))
    attention.observe(Assemble())
    assert attention.layers == ["blocks.0.attn", "blocks.1.attn"]
    assert list(attention.skipped) == ["attn_pool"]
    provenance = attention.provenance({})
    assert (provenance["layers"], provenance["skipped"]) == (attention.layers, attention.skipped)


# The model afterwards


def _mixed_modes(model: nn.Module) -> dict[nn.Module, bool]:
    model.train()
    model.blocks[1].eval()
    model.blocks[0].mlp.eval()
    return {module: module.training for module in model.modules()}


class Fails:
    def update(self, tile: Any) -> None:
        raise RuntimeError("broken")


@pytest.mark.parametrize("where", ["success", "observer", "model", "images", "progress"])
def test_modes_of_all_modules_are_restored(where: str) -> None:
    model = small_vit(dropout=0.5)
    before = _mixed_modes(model)
    modes: list[bool] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        modes.append(any(part.training for part in model.modules()))
        if where == "model":
            raise RuntimeError("broken")

    def pictures() -> Iterator[Tensor]:
        yield images()
        if where == "images":
            raise RuntimeError("broken")

    def progress(count: int) -> None:
        if where == "progress":
            raise RuntimeError("broken")

    attention = run(model, pictures())
    handle = model.blocks[0].register_forward_hook(hook)
    if where == "success":
        attention.observe(Assemble())
    else:
        with pytest.raises(RuntimeError, match="broken"):
            attention.observe(Fails() if where == "observer" else Assemble(), progress=progress)
    assert {module: module.training for module in model.modules()} == before
    assert not any(modes)
    assert bool(modes) is (where != "observer")
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_dropout_is_off_while_measuring() -> None:
    model, x = small_vit(dropout=0.5), images()
    np.testing.assert_array_equal(measured(model.train(), x), measured(model.eval(), x))


def test_parameters_are_the_same_and_without_gradients() -> None:
    model, outputs = small_vit(), []
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    attention_rollout(model, images(), device="cpu")
    assert outputs
    assert not any(output.requires_grad for output in outputs)
    for name, parameter in model.named_parameters():
        assert (before[name][0] is parameter, before[name][1]) == (True, parameter.data_ptr())
        assert parameter.grad is None
        assert parameter.requires_grad


def test_the_model_goes_home_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one device only here: the run is made to believe that the model came from another."""
    model, went = small_vit(), []
    monkeypatch.setattr(model, "to", lambda device: went.append(device) or model)
    attention = run(model, images())
    attention._home = torch.device("meta")
    with pytest.raises(RuntimeError, match="broken"):
        attention.observe(Fails())
    assert went == [torch.device("cpu"), torch.device("meta")]


def test_a_model_that_is_where_it_should_be_is_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_vit()
    monkeypatch.setattr(model, "to", None)
    run(model, images()).observe(Assemble())


def test_auto_leaves_a_model_on_its_accelerator() -> None:
    model = small_vit()
    attention = AttentionRun(model, images(), device="cpu")
    assert attention.device == torch.device("cpu")
    with pytest.raises(InputError, match="meta"):  # it is used where it is
        AttentionRun(model.to("meta"), images())


def test_a_model_that_does_not_fit_the_device_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    model, attempts = small_vit().train(), []

    def to(device: torch.device) -> nn.Module:
        attempts.append(device)
        if len(attempts) == 1:
            raise RuntimeError("out of memory")
        return model

    monkeypatch.setattr(model, "to", to)
    attention = run(model, images())
    attention._home = torch.device("meta")
    with pytest.raises(RuntimeError, match="out of memory"):
        attention.observe(Assemble())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_another_precision_are_given_their_own(dtype: torch.dtype) -> None:
    model, x = small_vit(), images()
    expected = measured(model, x)
    result = measured(model.to(dtype), x)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    np.testing.assert_allclose(result, expected, atol=1e-4 if dtype == torch.float64 else 0.15)
    assert result.dtype == np.float64


# Provenance


def test_provenance_says_where_the_numbers_come_from(folder: Path) -> None:
    model = small_vit()
    model.name = "small"
    model.preprocessing = PREPARE
    attention = run(model, folder, batch_size=2)
    attention.observe(Assemble())
    provenance = attention.provenance({"prefix": "drop"})
    assert set(provenance) == {
        "model",
        "images",
        "preprocessing",
        "grid",
        "windows",
        "layers",
        "skipped",
        "unfused",
        "options",
        "versions",
    }
    assert provenance["model"]["name"] == "small"
    assert provenance["model"]["class"] == "VisionTransformer"
    assert provenance["model"]["config"]["embed_dim"] == 16
    assert provenance["model"]["weights_sha256"] == weights_sha256(model)
    assert provenance["images"]["count"] == 5
    assert provenance["images"]["names"] == [f"{index}.png" for index in range(5)]
    pixels = [Image.open(path).convert("RGB").tobytes() for path in sorted(folder.iterdir())]
    digests = "".join(hashlib.sha256(image).hexdigest() for image in pixels)
    assert provenance["images"]["sha256"] == hashlib.sha256(digests.encode()).hexdigest()
    assert provenance["preprocessing"]["resize"] == 28
    assert provenance["grid"] == asdict(TokenGrid(3, 4, (8, 6), 1, True))
    assert provenance["windows"] == {}
    assert provenance["layers"] == ["blocks.0.attn", "blocks.1.attn"]
    assert provenance["options"] == {"prefix": "drop"}
    assert provenance["versions"]["torch"] == version("torch")


def test_provenance_tells_images_apart_but_not_their_batches() -> None:
    hashes = []
    for pictures, size in ((images(batch=5), 2), (images(batch=5), 3), (images(batch=5, seed=2), 2)):
        attention = run(small_vit(), pictures, batch_size=size)
        attention.observe(Assemble())
        hashes.append(attention.provenance({})["images"]["sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_provenance_of_a_model_of_transformers() -> None:
    provenance = model_provenance(FAMILIES["transformers-vit"].model())
    assert provenance["config"]["hidden_size"] == 32
    assert provenance["class"] == "ViTModel"


# Errors


def test_images_of_two_sizes() -> None:
    pictures = [images(24, 24), images(24, 36)]
    with pytest.raises(
        InputError,
        match="got 24 x 36 pixels after 24 x 24; resize them, or measure one size at a time",
    ):
        measured(small_vit(), pictures)


def test_photographs_without_preprocessing(photographs: list[Image.Image]) -> None:
    for model in (small_vit(), FAMILIES["timm"].model()):
        with pytest.raises(InputError, match=r"does not define how photographs are prepr.*; pass preprocessing=Preprocessing"):
            measured(model, photographs)


def test_a_generator_is_spent_after_one_pass() -> None:
    attention = run(small_vit(), _batches(images(), 2))
    attention.observe(measure := mean_attention_distance.observer(attention.grid))
    assert measure.compute().num_images == 3
    attention.observe(again := mean_attention_distance.observer(attention.grid))
    with pytest.raises(InputError, match="no values of attention_distance have been measured yet"):
        again.compute()


def test_a_grid_that_cannot_be_read() -> None:
    with pytest.raises(InputError, match="Linear cannot take images of 24 x 24 pixels"):
        run(nn.Linear(2, 2), images())
    model = nn.Sequential(nn.Conv2d(3, 16, 4, 2, 1), nn.GELU(), nn.Conv2d(16, 16, 4, 2, 1), Tokens())
    with pytest.raises(InputError, match=r"cannot determine the patch size of Sequential.*pass grid=TokenGrid"):
        run(model, images())
    assert run(model, images(), grid=TokenGrid(6, 6, (4, 4), 0, False)).grid.rows == 6


class Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).mT[:, None]
        return F.scaled_dot_product_attention(x, x, x)


def test_auto_is_a_device_that_works() -> None:
    assert torch.ones(1, device=select_device("auto")).item() == 1
    assert select_device("cpu") == torch.device("cpu")
