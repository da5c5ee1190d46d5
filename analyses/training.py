"""Training a Vision Transformer on small images: the recipe, and what `train_demo` and `finetune_resolution` share.

The recipe is the usual one for little data (Touvron et al. 2021, arXiv:2012.12877; Steiner et al. 2022, arXiv:2106.10270):
warm-up and cosine decay, random affine and colour augmentation, mixup and cutmix, label smoothing, stochastic depth, an
average of the weights. Two things make it short: Muon (arXiv:2502.16982) steps the layers' matrices, AdamW the rest; and in
all but the last epochs the layers see a random half of the patches, from which the pixels of the other half are predicted as
a second task (SupMAE, Liang et al. 2022, arXiv:2205.14540). Labels alone teach too few images what lies beside what.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel

from analyses.masking import Reconstruction, seen_patches
from analyses.small_images import Split, augment, mix, normalize
from vit_probe import InputError, VisionTransformer, save_model
from vit_probe.atomic_io import writable_folder, write_bytes
from vit_probe.plots.style import figure_size, save_figure, style
from vit_probe.results import weights_sha256

__all__ = ["Recipe", "accuracy", "fit"]

_PARTS = ("", "matrix_", "position_")


@dataclass(frozen=True)
class Recipe:
    """What decides the result, beside the data."""

    epochs: int = 24
    warmup: float = 2.0
    full_epochs: int = 2  # the last ones, in which the layers see every patch
    kept_patches: float = 0.5  # of all, in the epochs before
    batch_size: int = 192
    learning_rate: float = 1e-3
    matrix_learning_rate: float = 2.5e-3
    position_learning_rate: float = 5e-3  # of positions and of the class token
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    mixing: float = 0.4  # share of the batches that pass mixup or cutmix
    reconstruction: float = 1.0  # weight of the hidden patches' pixels in the loss
    averaging: float = 0.998
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise InputError(f"epochs and batch_size must be at least 1, got {self.epochs} and {self.batch_size}")
        if not 0 <= self.warmup < self.epochs:
            raise InputError(f"warmup must be shorter than the {self.epochs} epochs of the training, got {self.warmup}")
        if not 0 < self.kept_patches <= 1:
            raise InputError(f"kept_patches must lie above 0 and be at most 1, got {self.kept_patches}")
        for name in ("label_smoothing", "mixing", "averaging"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("full_epochs", "reconstruction", "weight_decay", *(f"{part}learning_rate" for part in _PARTS)):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be 0 or more, got {getattr(self, name)}")

    def changed(self, settings: Sequence[str]) -> Recipe:
        """The recipe with some values as given by `NAME=VALUE`.

        Raises:
            InputError: If there is no such name, or the value is of another type or out of range.
        """
        types = {field.name: type(getattr(self, field.name)) for field in fields(self)}
        values: dict[str, Any] = {}
        for setting in settings:
            name, _, value = setting.partition("=")
            if name not in types:
                raise InputError(f"--set {setting}: write NAME=VALUE with one of {', '.join(types)}")
            try:
                values[name] = types[name](value)
            except ValueError:
                raise InputError(f"--set {setting}: {value!r} is no {types[name].__name__}") from None
        return replace(self, **values)


def fit(model: VisionTransformer, train: Split, val: Split, recipe: Recipe, out: Path) -> VisionTransformer:
    """Trains, or goes on where an earlier call with the same `out` was stopped; returns the averaged model.

    Raises:
        InputError: If `out` holds the state of another training, or cannot be written; or the loss is no number any more.
    """
    writable_folder(out / "snapshots")
    for unfinished in out.glob(".*.[0-9]*"):  # what a killed training was about to write
        unfinished.unlink()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    average = AveragedModel(
        model, avg_fn=lambda mean, new, count: mean.lerp(new, 1 - min(recipe.averaging, (1 + count) / (10 + count)))
    )
    second_task = None
    if recipe.reconstruction and recipe.kept_patches < 1 and recipe.full_epochs < recipe.epochs:
        second_task = Reconstruction(model).to(device)
    optimizers = _new_optimizers(model, recipe, second_task)
    averaged: VisionTransformer = average.module  # type: ignore[assignment]
    parts: tuple[Any, ...] = (model, average, *optimizers, *([second_task] if second_task else []))
    about = asdict(recipe) | {"model": str(model.config), "classes": train.classes}
    about |= {
        "first weights": weights_sha256(model),
        "images": hashlib.sha256(train.images.contiguous().numpy().data).hexdigest(),
    }
    log = _resume(out / "state.pt", about, parts)
    if not log:
        _keep(model, out / "snapshots" / "epoch-000.safetensors")
    for epoch in range(len(log) + 1, recipe.epochs + 1):
        started = time.perf_counter()
        loss, right = _train_epoch(model, second_task, average, optimizers, train, recipe, epoch)
        with _fast(device):
            top1, top5 = accuracy(averaged, val)
        seconds = time.perf_counter() - started
        log.append(dict(epoch=epoch, loss=loss, train_top1=right, top1=top1, top5=top5, seconds=seconds))
        print(
            f"epoch {epoch:3d} of {recipe.epochs}   loss {loss:.3f}   training top-1 {right:4.1f} %   "
            f"validation top-1 {top1:4.1f} %, top-5 {top5:4.1f} %   {seconds:.0f} s",
            flush=True,
        )
        if epoch & (epoch - 1) == 0:
            _keep(averaged, out / "snapshots" / f"epoch-{epoch:03d}.safetensors")
        frame = pd.DataFrame(log)
        write_bytes(out / "log.csv", frame.to_csv(index=False).encode())
        save_figure(_plot_log(frame), out / "curve")
        buffer = BytesIO()
        torch.save(dict(about=about, log=log, parts=[part.state_dict() for part in parts]), buffer)
        write_bytes(out / "state.pt", buffer.getvalue())
    _keep(averaged, out / "model.safetensors")
    return averaged


@torch.inference_mode()
def accuracy(model: nn.Module, split: Split) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent, in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    ranks = []
    for images, labels in zip(split.images.split(200), split.labels.split(200), strict=True):
        logits = model(normalize(images.to(device))).float().cpu()
        # The rank of the right class counts those with equal logits, and those with NaN, as before it.
        ranks.append((~(logits < logits.gather(1, labels[:, None]))).sum(dim=1))
    rank = torch.cat(ranks)
    return 100 * (rank <= 1).double().mean().item(), 100 * (rank <= 5).double().mean().item()


def _train_epoch(
    model: VisionTransformer,
    second_task: Reconstruction | None,
    average: AveragedModel,
    optimizers: list[torch.optim.Optimizer],
    train: Split,
    recipe: Recipe,
    epoch: int,
) -> tuple[float, float]:
    """One pass over the images: mean loss, and accuracy in percent on the images as they were mixed."""
    model.train()
    device = next(model.parameters()).device
    # Sample anew from seed and epoch, so that an epoch is the same after a stop as without one (on a CPU, to the last bit).
    torch.manual_seed(recipe.seed * 100_003 + epoch)
    random = torch.Generator().manual_seed(recipe.seed * 100_003 + epoch)
    batches = torch.randperm(len(train.labels), generator=random).split(recipe.batch_size)
    kept = 1.0 if epoch > recipe.epochs - recipe.full_epochs else recipe.kept_patches
    losses, right, seen = 0.0, 0.0, 0
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, transient=True, disable=not sys.stdout.isatty())
    with seen_patches(model, kept) as choice, bar:
        task = bar.add_task(f"epoch {epoch}", total=len(batches))
        for number, chosen in enumerate(batches):
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["initial_lr"] * _schedule(recipe, epoch - 1 + number / len(batches))
            images, labels = augment(train.images[chosen].to(device), random), train.labels[chosen].to(device)
            hidden: Tensor | float = 0.0
            partner, share = torch.arange(len(labels), device=device), 1.0
            if torch.rand((), generator=random) < recipe.mixing:
                images, partner, share = mix(images, random)
            with _fast(device):  # anew for each step: autocast keeps its copies of the weights until it ends
                tokens = model.forward_features(images)
                logits = model.forward_head(tokens).float()
                table = model.position_table()
                if second_task and choice.hidden.shape[1]:
                    hidden = second_task(images, tokens, table[0] if table else None, choice)
            loss = share * F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            loss = loss + (1 - share) * F.cross_entropy(logits, labels[partner], label_smoothing=recipe.label_smoothing)
            if not loss.isfinite():
                raise InputError(f"the loss is {loss.item()} in epoch {epoch}; start anew with lower learning rates")
            for optimizer in optimizers:
                optimizer.zero_grad()
            (loss + recipe.reconstruction * hidden).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            average.update_parameters(model)
            best = logits.argmax(dim=1)
            right += share * (best == labels).sum().item() + (1 - share) * (best == labels[partner]).sum().item()
            losses, seen = losses + loss.item() * len(labels), seen + len(labels)
            shown = f"epoch {epoch}   loss {losses / seen:.3f}   top-1 {100 * right / seen:.1f} %"
            bar.update(task, advance=1, description=shown)
    return losses / seen, 100 * right / seen


def _new_optimizers(
    model: VisionTransformer, recipe: Recipe, second_task: Reconstruction | None
) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for all else; no weight decay for biases, norms, tokens and positions."""
    matrices = [parameter for parameter in model.blocks.parameters() if parameter.ndim == 2]
    known = set(map(id, matrices))
    others = [*model.parameters(), *(second_task.parameters() if second_task else ())]
    others = [parameter for parameter in others if id(parameter) not in known and parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in others if parameter.ndim == ndim],
            "lr": recipe.position_learning_rate if ndim == 3 else recipe.learning_rate,
            "weight_decay": recipe.weight_decay if ndim in (2, 4) else 0.0,
        }
        for ndim in range(1, 5)
    ]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups, betas=(0.9, 0.98)),
    ]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers


def _schedule(recipe: Recipe, epoch: float) -> float:
    """The learning rate over its highest, `epoch` epochs into training: a linear rise, then half a cosine down to 0."""
    if epoch < recipe.warmup:
        return epoch / recipe.warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - recipe.warmup) / (recipe.epochs - recipe.warmup)))


def _fast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 where the processor computes in it; on a CPU plain attention, whose backward pass is faster for few tokens."""
    stack = ExitStack()
    native = device.type == "cuda" or bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16, enabled=native))
    if device.type == "cpu":
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    return stack


def _resume(path: Path, about: dict[str, Any], parts: tuple[Any, ...]) -> list[dict[str, float]]:
    """Puts the last state back into model, average and optimizers; returns the log so far."""
    if not path.exists():
        return []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        differing = [name for name, value in about.items() if state["about"].get(name) != value]
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} is no whole state of a training ({type(error).__name__}); delete it to begin anew") from None
    if differing:
        raise InputError(
            f"{path} is the state of another training, which differs in: {', '.join(differing)}; name another folder with "
            "--out, or repeat the command that began it"
        )
    for part, saved in zip(parts, state["parts"], strict=True):
        part.load_state_dict(saved)
    return state["log"]


def _keep(model: VisionTransformer, path: Path) -> None:
    """Writes the model in float16."""
    half = VisionTransformer(model.config).half()
    half.load_state_dict(model.state_dict())
    half.preprocessing = model.preprocessing
    save_model(half, path)


def _plot_log(log: pd.DataFrame) -> Figure:
    """Loss and accuracy against epochs."""
    with style():
        figure = Figure(figsize=figure_size("neurips", 0.45), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(log.epoch, log.loss, marker=".")
        left.set(xlabel="Epoch", ylabel="Training loss\n(nats, mixed images)")
        accuracies = (log.epoch, log.top5, "o-", log.epoch, log.top1, "s-", log.epoch, log.train_top1, "^--")
        labels = "Top 5, validation", "Top 1, validation", "Top 1, training (mixed images)"
        right.legend(right.plot(*accuracies, markersize=3), labels, loc="lower left", bbox_to_anchor=(0, 1))
        right.set(xlabel="Epoch", ylabel="Accuracy (%)", ylim=(0, 100))
    return figure
