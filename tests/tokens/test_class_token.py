"""Which token is the class token: told from what a model's output depends on, else from its parameters' names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.checkpoints.parity import randomize
from vit_probe import InputError, TokenGrid, attention_rollout, class_attention, mean_attention_distance
from vit_probe.tokens.locate import locate_tokens


class Tokens(nn.Module):
    """Two attention layers on 4 x 4 patches between named tokens; `pool` makes the output of all tokens.

    Args:
        before: Parameters before the patches, by name, with their number of tokens.
        behind: The same behind the patches.
        pool: Of (image, token, dim).
    """

    def __init__(
        self,
        before: dict[str, int],
        pool: Callable[[Tensor], Tensor],
        behind: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.behind, self.pool = list(before), list(behind or {}), pool
        for name, count in (before | (behind or {})).items():
            self.register_parameter(name, nn.Parameter(torch.randn(1, count, 16)))
        self.proj, self.norm = nn.Conv2d(3, 16, 8, 8), nn.LayerNorm(16)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.queries: list[Tensor] = []
        self.keys: list[Tensor] = []
        randomize(self)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.proj(images).flatten(2).mT
        around = ([getattr(self, name).expand(len(images), -1, -1) for name in names] for names in (self.before, self.behind))
        before, behind = around
        x = torch.cat([*before, patches, *behind], dim=1)
        for qkv in self.qkv:
            q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in qkv(self.norm(x)).chunk(3, -1))
            self.queries.append(q)
            self.keys.append(k)
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.pool(self.norm(x))


def at(token: int) -> Callable[[Tensor], Tensor]:
    return lambda tokens: tokens[:, token]


def everything(tokens: Tensor) -> Tensor:
    return tokens


USED = {
    "the class token is first": (Tokens({"first": 1}, at(0)), 0),
    "registers stand before it": (Tokens({"registers": 2, "last": 1}, at(2)), 2),
    "registers are called class tokens": (Tokens({"cls_token": 1, "other": 1}, at(1)), 1),
    "it is averaged with the patches' mean": (Tokens({"a": 1, "b": 1}, lambda t: t[:, 1] + t[:, 2:].mean(1)), 1),
    "it stands behind the patches": (Tokens({}, at(16), behind={"last": 1}), 16),
}
NAMED = {
    "all tokens are returned": (Tokens({"reg_token": 2, "cls_token": 1}, everything), 2),
    "two heads are averaged": (Tokens({"class_token": 1, "dist_token": 1}, lambda t: t[:, :2].mean(1)), 0),
    "the patches are averaged": (Tokens({"class_embedding": 1}, lambda t: t[:, 1:].mean(1)), 0),
    "all tokens are averaged": (Tokens({"reg": 1, "cls": 1}, lambda t: t.mean(1)), 1),
}
NONE = {
    "registers alone, and the patches are averaged": Tokens({"registers": 3}, lambda t: t[:, 3:].mean(1)),
    "patches alone": Tokens({}, everything),
}
UNKNOWN = {
    "all tokens are returned, and none is named": Tokens({"registers": 2}, everything),
    "all tokens are averaged": Tokens({"register": 1}, lambda t: t.mean(1)),
    "several tokens share the name": Tokens({"cls_token": 2}, everything),
    "two unnamed tokens are used": Tokens({"a": 1, "b": 1}, lambda t: t[:, :2].mean(1)),
    "the output depends on nothing": Tokens({"a": 1}, lambda t: 0 * t[:, 0]),
    "the name contradicts the use": Tokens({"cls_token": 1, "a": 1, "b": 1}, lambda t: t[:, 1:3].mean(1)),
}


@pytest.mark.parametrize(("model", "place"), (USED | NAMED).values(), ids=USED | NAMED)
def test_the_place_of_the_class_token(model: Tokens, place: int) -> None:
    grid = locate_tokens(model, 32, 32).grid
    assert (grid.has_cls_token, grid.class_token) == (True, place)


@pytest.mark.parametrize("model", NONE.values(), ids=NONE)
def test_no_class_token(model: Tokens) -> None:
    grid = locate_tokens(model, 32, 32).grid
    assert (grid.has_cls_token, grid.class_token) == (False, None)


@pytest.mark.parametrize("model", UNKNOWN.values(), ids=UNKNOWN)
def test_where_nothing_tells_only_measures_that_read_the_class_token_object(model: Tokens) -> None:
    images = torch.randn(2, 3, 32, 32)
    assert locate_tokens(model, 32, 32).grid.has_cls_token is None
    assert mean_attention_distance(model, images).distance.shape == (2, 2)
    for measure in (class_attention, attention_rollout):
        with pytest.raises(InputError, match=r"which of the \d tokens that are not patches is the class token .* class_token="):
            measure(model, images)
    prefix = sum(getattr(model, name).shape[1] for name in model.before)
    told = TokenGrid(4, 4, (8, 8), prefix, True, class_token=prefix - 1)
    assert attention_rollout(model, images, grid=told).maps.shape == (2, 4, 4)


@pytest.mark.parametrize(("model", "place"), [USED["registers stand before it"], USED["it stands behind the patches"]])
def test_the_row_of_the_class_token_is_shown_and_followed(model: Tokens, place: int) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    shown, followed = class_attention(model, images, layer=0).maps, attention_rollout(model, images).maps
    model.queries.clear()
    model.keys.clear()
    with torch.no_grad():
        model(images)
    maps = [torch.softmax(q.double() @ k.double().mT / 8**0.5, -1) for q, k in zip(model.queries, model.keys, strict=True)]
    patches = slice(3, 19) if place == 2 else slice(0, 16)
    torch.testing.assert_close(torch.tensor(shown).flatten(2).double(), maps[0][:, :, place, patches], rtol=1e-5, atol=1e-7)
    first, second = (0.5 * one.mean(1) + 0.5 * torch.eye(one.shape[-1], dtype=torch.float64) for one in maps)
    torch.testing.assert_close(
        torch.tensor(followed).flatten(1).double(), (second @ first)[:, place, patches], rtol=1e-5, atol=1e-7
    )


def test_attention_on_tokens_behind_the_patches_is_not_attention_on_patches() -> None:
    model = Tokens({"cls_token": 1}, everything, behind={"prompts": 3})
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    result = mean_attention_distance(model, images)
    assert result.provenance["grid"]["num_suffix_tokens"] == 3
    model.queries.clear()
    model.keys.clear()
    with torch.no_grad():
        model(images)
    centres = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).double() * 8
    distances = torch.cdist(centres, centres)
    for layer, (q, k) in enumerate(zip(model.queries, model.keys, strict=True)):
        weights = torch.softmax(q.double() @ k.double().mT / 8**0.5, -1)[:, :, 1:17, 1:17]
        mass = weights.sum(-1)
        expected = ((weights * distances).sum(-1) / mass).mean((0, 2))
        torch.testing.assert_close(torch.tensor(result.distance[layer]), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.tensor(result.patch_mass[layer]), mass.mean((0, 2)), rtol=1e-5, atol=0)


def test_the_model_runs_no_further_image_for_it() -> None:
    def images_shown(model: Tokens, grid: TokenGrid | None) -> int:
        shown: list[int] = []
        handle = model.proj.register_forward_hook(lambda module, args, output: shown.append(len(output)))
        locate_tokens(model, 32, 32, grid=grid)
        handle.remove()
        return sum(shown)

    model, place = USED["registers stand before it"]
    assert images_shown(model, None) == images_shown(model, TokenGrid(4, 4, (8, 8), 3, True, class_token=place))
