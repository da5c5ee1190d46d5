"""Which patches the layers see, and what is asked about the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from analyses.masking import Choice, Reconstruction, seen_patches
from vit_probe import VisionTransformer, ViTConfig

CONFIG = ViTConfig(image_size=(16, 24), patch_size=(4, 8), embed_dim=32, depth=1, num_heads=2, num_classes=3, num_registers=1)


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(CONFIG).eval()


def images() -> torch.Tensor:
    return torch.rand(4, 3, 16, 24, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_layers_see_a_share_of_the_patches(model: VisionTransformer) -> None:
    """Each image its own, prefix tokens first, positions added before."""
    seen: list[torch.Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    whole = model._embed(images())
    with seen_patches(model, 0.5) as choice:
        model(images())
    (tokens,) = seen
    assert tokens.shape == (4, 2 + 6, 32)
    assert torch.equal(tokens[:, :2], whole[:, :2])
    for image in range(4):
        assert torch.equal(tokens[image, 2:], whole[image, 2 + choice.seen[image]])
        assert sorted([*choice.seen[image].tolist(), *choice.hidden[image].tolist()]) == list(range(12))
    assert len({tuple(sorted(seen)) for seen in choice.seen.tolist()}) > 1
    assert not model.pos_drop._forward_hooks


@torch.no_grad()
def test_all_patches_are_seen_as_without_a_choice(model: VisionTransformer) -> None:
    plain = model.forward_features(images())
    with seen_patches(model, 1.0) as choice:
        assert torch.equal(model.forward_features(images()), plain)
    assert choice.hidden.shape == (4, 0)


@torch.no_grad()
def test_one_patch_is_always_seen(model: VisionTransformer) -> None:
    with seen_patches(model, 0.01) as choice:
        assert model.forward_features(images()).shape == (4, 3, 32)
    assert choice.seen.shape == (4, 1)


def test_the_hook_is_gone_after_an_exception(model: VisionTransformer) -> None:
    with pytest.raises(ZeroDivisionError), seen_patches(model, 0.5):
        raise ZeroDivisionError
    assert not model.pos_drop._forward_hooks


@torch.no_grad()
def test_the_error_is_of_the_pixels_of_hidden_patches(model: VisionTransformer) -> None:
    """A predictor of one constant per pixel of a patch: its error from the image, cut up by hand."""
    task = Reconstruction(model)
    torch.nn.init.zeros_(task.to_pixels.weight)
    constant = torch.rand(3 * 4 * 8)
    task.to_pixels.bias.copy_(constant)
    hidden = torch.tensor([[0, 5], [11, 3], [7, 8], [2, 1]])
    choice = Choice(seen=torch.zeros(4, 10, dtype=torch.long), hidden=hidden)
    table = model.position_table()
    assert table is not None
    error = task(images(), torch.rand(4, 12, 32), table[0], choice)
    squares = []
    for image, patches in enumerate(hidden.tolist()):
        for patch in patches:
            row, col = divmod(patch, 3)
            pixels = images()[image, :, 4 * row : 4 * row + 4, 8 * col : 8 * col + 8]
            squares.append((pixels - constant.reshape(3, 4, 8)) ** 2)
    torch.testing.assert_close(error, torch.stack(squares).mean())


def test_positions_and_tokens_learn_from_it(model: VisionTransformer) -> None:
    task = Reconstruction(model)
    with seen_patches(model, 0.5) as choice:
        tokens = model.forward_features(images())
    table = model.position_table()
    assert table is not None
    task(images(), tokens, table[0], choice).backward()
    gradient = model.pos_embed.grad
    assert gradient is not None
    assert (gradient[0, 2:].abs().sum(1) > 0).all()
    assert model.patch_embed.proj.weight.grad.abs().max() > 0  # type: ignore[union-attr]


def test_a_model_without_positions_is_asked_by_a_table_of_the_task_s_own() -> None:
    """The table takes part in nothing that is trained or saved, and another hidden patch gets another answer."""
    torch.manual_seed(0)
    task = Reconstruction(VisionTransformer(replace(CONFIG, position="none")))
    assert "places" not in task.state_dict()
    assert not task.places.requires_grad
    tokens = torch.rand(4, 3 + 2, 32)
    errors = []
    for patch in (2, 9):
        choice = Choice(seen=torch.zeros(4, 3, dtype=torch.long), hidden=torch.full((4, 1), patch))
        errors.append(task(torch.zeros(4, 3, 16, 24), tokens, None, choice))
    assert errors[0] != errors[1]
    errors[0].backward()
    assert task.from_position.weight.grad is not None
