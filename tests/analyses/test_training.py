"""Training learns, goes on after a kill as if there had been none, and refuses what it cannot go on from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from analyses import training
from analyses.masking import Reconstruction
from analyses.small_images import Split, normalize, read_data
from analyses.training import Recipe, accuracy, fit
from vit_probe import VisionTransformer, ViTConfig, load_model
from vit_probe.errors import InputError

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="training takes torch.optim.Muon, of torch 2.9")

CONFIG = ViTConfig(image_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3, drop_path=0.1)
SHORT = Recipe(epochs=3, warmup=0.5, full_epochs=1, batch_size=32)


def new_model(config: ViTConfig = CONFIG) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(config)


@pytest.fixture(scope="module")
def data(sheets: Path) -> tuple[Split, Split]:
    return read_data(sheets, 16)


@pytest.fixture(scope="module")
def undisturbed(data: tuple[Split, Split], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    fit(new_model(), *data, SHORT, out)
    return out


def test_a_model_learns(data: tuple[Split, Split], tmp_path: Path) -> None:
    recipe = replace(SHORT, epochs=12, mixing=0.2, matrix_learning_rate=1e-2, learning_rate=4e-3, averaging=0.9)
    model = fit(new_model(replace(CONFIG, drop_path=0.0)), *data, recipe, tmp_path)
    log = pd.read_csv(tmp_path / "log.csv")
    assert log.epoch.tolist() == list(range(1, 13))
    assert log.top1.iloc[-1] > 70  # by chance 33
    assert log.loss.iloc[-1] < log.loss.iloc[0]
    assert accuracy(model, data[1])[0] == pytest.approx(log.top1.iloc[-1], abs=4)  # bfloat16 there, float32 here


def test_what_is_left_behind(undisturbed: Path) -> None:
    assert (undisturbed / "curve.png").read_bytes().startswith(b"\x89PNG")
    names = sorted(path.name for path in (undisturbed / "snapshots").iterdir())
    assert names == ["epoch-000.safetensors", "epoch-001.safetensors", "epoch-002.safetensors"]
    before, after = (load_model(undisturbed / "snapshots" / f"epoch-00{epoch}.safetensors") for epoch in (0, 2))
    for name, value in new_model().state_dict().items():
        assert torch.equal(before.state_dict()[name], value.half().float())
    assert not torch.equal(before.blocks[0].attn.qkv.weight, after.blocks[0].attn.qkv.weight)
    assert load_model(undisturbed / "model.safetensors").config == CONFIG
    assert (undisturbed / "model.safetensors").stat().st_size < 2.2 * sum(p.numel() for p in after.parameters()) + 20_000


@pytest.mark.parametrize("stopped_in", [1, 2, 3])
def test_after_a_stop_training_ends_as_if_there_had_been_none(
    stopped_in: int, data: tuple[Split, Split], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_epoch = training._train_epoch

    def stopped(*arguments: Any) -> Any:
        if arguments[-1] == stopped_in:
            arguments[0].train()
            for parameter in arguments[0].parameters():  # half an epoch's damage
                parameter.data.add_(0.1)
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    monkeypatch.setattr(training, "_train_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit(new_model(), *data, SHORT, tmp_path)
    monkeypatch.undo()
    resumed = fit(new_model(), *data, SHORT, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert resumed.config == CONFIG
    columns = ["epoch", "loss", "train_top1", "top1", "top5"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "log.csv")[columns], pd.read_csv(undisturbed / "log.csv")[columns])


def test_the_seed_decides(data: tuple[Split, Split], undisturbed: Path, tmp_path: Path) -> None:
    fit(new_model(), *data, replace(SHORT, seed=1), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() != (undisturbed / "model.safetensors").read_bytes()


def test_another_training_is_not_gone_on_with(data: tuple[Split, Split], undisturbed: Path) -> None:
    state = (undisturbed / "state.pt").read_bytes()
    with pytest.raises(InputError, match=r"state.pt is the state of another training, which differs in: epochs, seed;"):
        fit(new_model(), *data, replace(SHORT, epochs=4, seed=2), undisturbed)
    with pytest.raises(InputError, match="differs in: model, first weights;"):
        fit(new_model(replace(CONFIG, depth=1)), *data, SHORT, undisturbed)
    renamed = replace(data[0], classes=["a", "b", "c"])
    with pytest.raises(InputError, match="differs in: classes;"):
        fit(new_model(), renamed, data[1], SHORT, undisturbed)
    darker = replace(data[0], images=data[0].images // 2)
    with pytest.raises(InputError, match="differs in: images;"):
        fit(new_model(), darker, data[1], SHORT, undisturbed)
    another = new_model()
    with torch.no_grad():
        another.cls_token += 1
    with pytest.raises(InputError, match="differs in: first weights;"):
        fit(another, *data, SHORT, undisturbed)
    assert (undisturbed / "state.pt").read_bytes() == state


def test_every_parameter_is_stepped_by_one_optimizer() -> None:
    model = new_model(replace(CONFIG, position="sincos_2d"))
    second_task = Reconstruction(model)
    muon, adamw = training._new_optimizers(model, Recipe(), second_task)
    named = [*model.named_parameters(), *second_task.named_parameters(prefix="second")]
    names = {id(parameter): name for name, parameter in named}
    by_muon = {names[id(parameter)] for group in muon.param_groups for parameter in group["params"]}
    assert by_muon == {
        f"blocks.{layer}.{part}.weight" for layer in range(2) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    stepped = [(names[id(parameter)], group) for group in adamw.param_groups for parameter in group["params"]]
    assert {name for name, _ in stepped} == set(names.values()) - by_muon - {"pos_embed"}
    assert len(stepped) + len(by_muon) + 1 == len(names)
    decayed = {name for name, group in stepped if group["weight_decay"] and not name.startswith("second")}
    assert decayed == {"patch_embed.proj.weight", "head.weight"}
    assert {group["lr"] for name, group in stepped if name == "cls_token"} == {Recipe().position_learning_rate}


def test_the_second_task_teaches_positions_what_lies_beside_what(data: tuple[Split, Split], tmp_path: Path) -> None:
    """Images of one bright half teach it: neighbours' embeddings become more alike than those of distant patches."""
    rows = torch.arange(16)[:, None].expand(16, 16)
    ramps = torch.stack([rows, 15 - rows, rows.T, 15 - rows.T])[torch.arange(256) % 4] * 16
    images = ramps[:, None].expand(-1, 3, -1, -1).to(torch.uint8).contiguous()
    split = Split(images, torch.zeros(256, dtype=torch.long), ["a", "b", "c"])
    recipe = replace(SHORT, epochs=15, mixing=0.0, full_epochs=0, reconstruction=10.0, averaging=0.5)
    similarity = {}
    for weight in (0.0, 10.0):
        model = fit(new_model(), split, split, replace(recipe, reconstruction=weight), tmp_path / str(weight))
        table = torch.nn.functional.normalize(model.pos_embed[0, 1:].detach(), dim=1)
        places = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
        apart, alike = torch.cdist(places, places), table @ table.T
        similarity[weight] = (alike[apart == 1].mean() - alike[apart > 2.5].mean()).item()
    assert similarity[10.0] > similarity[0.0] + 0.1


def test_the_learning_rate_rises_and_falls() -> None:
    recipe = Recipe(epochs=10, warmup=2.0)
    rates = [training._schedule(recipe, epoch) for epoch in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_accuracy_counts_ranks() -> None:
    class Fixed(torch.nn.Module):
        """Logits that put class 0 first, class 1 second, and so on."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return -torch.arange(10.0).expand(len(images), -1)

    labels = torch.tensor([0] * 300 + [1] * 50 + [4] * 50 + [5] * 100)
    split = Split(torch.zeros(500, 3, 1, 1, dtype=torch.uint8), labels, [str(number) for number in range(10)])
    assert accuracy(Fixed(), split) == (60, 80)
    assert normalize(split.images[:1]).shape == (1, 3, 1, 1)


def test_equal_logits_are_no_hit() -> None:
    split = Split(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.tensor([0, 1, 2, 0]), ["a", "b", "c"])
    assert accuracy(new_model(), split)[0] == 0  # the head is zero before training


def test_logits_that_are_no_numbers_are_no_hit(data: tuple[Split, Split]) -> None:
    model = new_model()
    with torch.no_grad():
        model.cls_token += torch.nan
    assert accuracy(model, data[1])[0] == 0


def test_a_diverged_training_stops_and_leaves_no_state(data: tuple[Split, Split], tmp_path: Path) -> None:
    model = new_model()
    with torch.no_grad():
        model.cls_token += torch.nan
    with pytest.raises(InputError, match="the loss is nan in epoch 1; start anew with lower learning rates"):
        fit(model, *data, SHORT, tmp_path)
    assert not (tmp_path / "state.pt").exists()


@pytest.mark.parametrize("content", [b"", b"no state", b"half"], ids=["empty", "foreign", "cut short"])
def test_a_state_that_is_not_whole(content: bytes, data: tuple[Split, Split], undisturbed: Path, tmp_path: Path) -> None:
    whole = (undisturbed / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    with pytest.raises(InputError, match=r"state.pt is no whole state of a training \(.*\); delete it to begin anew"):
        fit(new_model(), *data, SHORT, tmp_path)


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_curve_shows_every_epoch(epochs: int) -> None:
    log = pd.DataFrame({name: range(1, epochs + 1) for name in ("epoch", "loss", "train_top1", "top1", "top5")})
    left, right = training._plot_log(log).axes
    assert [len(line.get_xdata()) for line in (*left.lines, *right.lines)] == [epochs] * 4  # type: ignore[arg-type]
    assert left.lines[0].get_marker() == "."
    assert left.get_ylabel() == "Training loss\n(nats, mixed images)"
    assert right.get_ylabel() == "Accuracy (%)"
    assert {line.get_marker() for line in right.lines} == {"o", "s", "^"}  # told apart without colour
    legend = right.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["Top 5, validation", "Top 1, validation", "Top 1, training (mixed images)"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["speed=9"], "--set speed=9: write NAME=VALUE with one of epochs, warmup"),
        (["epochs"], "--set epochs: '' is no int"),
        (["epochs=many"], "--set epochs=many: 'many' is no int"),
        (["epochs=0"], "epochs and batch_size must be at least 1, got 0 and 192"),
        (["epochs=2"], "warmup must be shorter than the 2 epochs of the training, got 2.0"),
        (["mixing=7"], "mixing must lie in [0, 1], got 7.0"),
        (["averaging=nan"], "averaging must lie in [0, 1], got nan"),
        (["position_learning_rate=-1"], "position_learning_rate must be 0 or more, got -1.0"),
        (["kept_patches=0"], "kept_patches must lie above 0 and be at most 1, got 0.0"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Recipe().changed(settings)
    assert message in str(caught.value)


def test_settings_change_the_recipe() -> None:
    assert Recipe().changed(["epochs=5", "warmup=1"]) == Recipe(epochs=5, warmup=1.0)
