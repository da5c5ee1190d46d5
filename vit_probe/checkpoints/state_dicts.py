"""Finding the parameters of a model inside the checkpoints that training writes."""

from __future__ import annotations

import re
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_probe.checkpoints.architectures import is_timm_name
from vit_probe.checkpoints.huggingface import MODEL_TYPES
from vit_probe.data.image_files import printable
from vit_probe.errors import AssumptionWarning, InputError, UnsupportedArchitecture

__all__ = ["find_state", "stated_architecture"]

_MAX_NESTING = 32  # a hostile file may nest dictionaries without end
# Modules of torch.compile, FSDP and activation checkpointing, which may wrap a whole model or any part of it.
_WRAPPERS = r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
# The patch embedding as timm, torchvision and transformers call it; the last may put the name of its base model before it.
_BASE_MODEL = rf"(?:{'|'.join(MODEL_TYPES)})\."
_ANCHOR = (
    r"(?:^|\.)(?P<anchor>patch_embed\.proj\.weight|conv_proj\.weight"
    rf"|(?P<base>{_BASE_MODEL})?embeddings\.patch_embeddings\.projection\.weight)$"
)
# Of several models in one file, the average over training steps is taken: it is what the papers evaluate.
# Lightning's callback WeightAveraging writes the average as `state_dict`; ALBEF's and BLIP's ends in `_m`, MoCo's in `_k`.
_WORD = r"(?<![a-z0-9])({})(?![a-z0-9])"
_AVERAGES = _WORD.format("teacher|(net|model)?ema|target|momentum|average|averaged|avg|swa|shadow|key|encoder_[km]")
_TRAINED = _WORD.format("student|online|query|encoder_q|current_model_state")
_OPTIMIZERS = _WORD.format("optimizers?|optim|opt")
# Parts of pre-training which some programs keep in the model itself: MAE's decoder, the projection heads of MoCo v3 and MSN.
_PRETRAINING = r"decoder[_.]|head\.(?!(weight|bias)$)|fc\.(fc|bn)\d\."
_COUNTERS = r"(^|\.)total_(ops|params)$"  # thop counts operations and parameters in buffers of each module
# Where checkpoints name the architecture: directly, or among the options of the training program.
_NAME_KEYS = ("arch", "architecture", "model", "model_name")
_OPTIONS = ("args", "config", "hyper_parameters")


@dataclass(frozen=True)
class _Candidate:
    """Parameters of one model: those in `tensors` whose names begin with `prefix`."""

    path: str
    prefix: str
    tensors: Mapping[str, Any]
    base: str = ""

    @property
    def label(self) -> str:
        """What messages call the model."""
        return f"{self.path}{self.prefix}".rstrip(".") or "the file's outermost level"

    @property
    def preference(self) -> int:
        """Rank by the words of the label; the lowest is preferred. Of the keys that tell, the innermost decides."""
        label = self.label.lower()
        if re.search(_OPTIMIZERS, label):
            return 3
        for key in reversed(label.split(".")):
            if re.search(_AVERAGES, key):
                return 0
            if re.search(_TRAINED, key):
                return 2
        return 1


def find_state(content: Any, path: Path) -> dict[str, Tensor]:
    """Find a model's parameters in the content of a checkpoint, and strip what training put before their names.

    The content is a state dict, or dictionaries nested to any depth with one or more state dicts in them. What precedes the
    name of a Vision Transformer's patch embedding (`module.backbone.` of `module.backbone.patch_embed.proj.weight`) is the
    prefix of that model's parameters; parameters without it belong to heads, predictors and other towers, and are left out.
    Modules of torch.compile and FSDP in the names are removed, thop's counters left out, and DINOv2's numbers of blocks in
    chunks replaced by plain ones.

    Of several Vision Transformers, a teacher, target or moving average is preferred to the model that was trained; a warning
    says which was taken, and which other parts of pre-training (MAE's decoder) were left out.

    Args:
        content: What the file holds.
        path: The file, for error messages.

    Returns:
        Parameters by name. If there is no Vision Transformer, all those of the largest state dict.

    Raises:
        UnsupportedArchitecture: If there are several Vision Transformers of which none is to be preferred, or one whose blocks
            are numbered anew in each group.
        InputError: If there are no named parameters, or something else than a tensor in the place of a parameter.
    """
    groups = list(_tensor_groups(content))
    if not groups:
        raise InputError(f"{path} holds no named parameters; save the model's state_dict()")
    candidates = [candidate for group in groups for candidate in _vision_transformers(*group)]
    if not candidates:
        others = [_Candidate(keys, "", tensors) for keys, tensors in groups]
        return _strip_data_parallel(_select(min(others, key=lambda one: (one.preference, -len(one.tensors))), []))
    chosen = _choose(candidates, path)
    state = _select(chosen, candidates)
    pretraining = [name for name in state if re.match(_PRETRAINING, name)]
    if pretraining:
        parts = dict.fromkeys(name.partition(".")[0] for name in pretraining)
        warnings.warn(
            f"{printable(path.name)} holds parts of pre-training beside the encoder, which are left out: {', '.join(parts)}",
            AssumptionWarning,
            stacklevel=2,
        )
    return _number_blocks({name: value for name, value in state.items() if name not in pretraining})


def stated_architecture(content: Any, state: Mapping[str, Tensor]) -> str:
    """Return the name of timm's that a checkpoint itself gives to the model found in it; empty if it gives none.

    Args:
        content: What the file holds.
        state: What `find_state` returned for it.

    Examples:
        >>> state = {"cls_token": torch.zeros(1, 1, 8)}
        >>> stated_architecture({"arch": "vit_base_patch16_gap_224", "state_dict": state}, state)
        'vit_base_patch16_gap_224'
    """
    held = {id(value) for value in state.values()}
    pending: deque[tuple[tuple[Mapping[Any, Any], ...], Any]] = deque([((), content)])
    seen: set[int] = set()
    while pending:
        outer, group = pending.popleft()
        if not isinstance(group, Mapping) or id(group) in seen or len(outer) > _MAX_NESTING:
            continue
        seen.add(id(group))
        if not held.isdisjoint(map(id, group.values())):
            return next(filter(is_timm_name, _names_given((*outer, group))), "")
        pending.extend(((*outer, group), value) for value in group.values())
    return ""


def _names_given(groups: tuple[Mapping[Any, Any], ...]) -> Iterator[str]:
    """Yield the names of architectures that nested dictionaries hold, innermost first."""
    for group in reversed(groups):
        options = [group[key] for key in _OPTIONS if isinstance(group.get(key), Mapping)]
        values = [level.get(key) for level in (group, *options) for key in _NAME_KEYS]
        yield from (value.rpartition("/")[2] for value in values if isinstance(value, str))


def _tensor_groups(content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every dictionary that holds tensors, outermost first, with the dotted path of its keys."""
    pending: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    seen: set[int] = set()  # a dictionary may hold itself
    while pending:
        keys, group = pending.popleft()
        if not isinstance(group, Mapping) or id(group) in seen or len(keys) > _MAX_NESTING:
            continue
        seen.add(id(group))
        if any(isinstance(value, Tensor) for value in group.values()):
            yield "".join(f"{key}." for key in keys), _without_wrappers(group)
        pending.extend(((*keys, str(key)), value) for key, value in group.items() if isinstance(value, Mapping))


def _without_wrappers(group: Mapping[Any, Any]) -> dict[str, Any]:
    renamed = {re.sub(_WRAPPERS, "", str(name)): value for name, value in group.items()}
    if len(renamed) < len(group):
        raise InputError("the checkpoint holds a parameter twice, once inside a wrapper such as _orig_mod")
    return renamed


def _vision_transformers(path: str, group: dict[str, Any]) -> Iterator[_Candidate]:
    for name in group:
        if match := re.search(_ANCHOR, name):
            prefix = name[: match.start("anchor")]
            # torchvision's name for the patch embedding also occurs in convolutional networks.
            if match["anchor"] != "conv_proj.weight" or f"{prefix}encoder.pos_embedding" in group:
                yield _Candidate(path, prefix, group, match["base"] or "")


def _choose(candidates: list[_Candidate], path: Path) -> _Candidate:
    best = min(candidate.preference for candidate in candidates)
    preferred = [candidate for candidate in candidates if candidate.preference == best]
    chosen, state = preferred[0], _select(preferred[0], candidates)
    labels = ", ".join(candidate.label for candidate in candidates[:10])
    if any(not _equal(_select(other, candidates), state) for other in preferred[1:]):
        raise UnsupportedArchitecture(
            f"{path} holds several Vision Transformers, and nothing says which is meant: {labels}; save the state_dict() of one"
        )
    if len(preferred) < len(candidates):
        warnings.warn(
            printable(
                f"{path.name} holds several Vision Transformers ({labels}); {chosen.label} is taken, because averages and "
                "teachers are preferred to the model that was trained (to load another, save its state_dict() alone)"
            ),
            AssumptionWarning,
            stacklevel=3,
        )
    return chosen


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def _select(candidate: _Candidate, candidates: list[_Candidate]) -> dict[str, Tensor]:
    """Return the candidate's parameters, without its prefix and without those of models inside it."""
    inner = tuple(
        other.prefix
        for other in candidates
        if other.tensors is candidate.tensors and other.prefix.startswith(candidate.prefix) and other.prefix != candidate.prefix
    )
    own = rf"{candidate.base}|(cls_|distillation_)?classifier\.(weight|bias)$" if candidate.base else ""
    state: dict[str, Tensor] = {}
    for full_name, value in candidate.tensors.items():
        name = full_name.removeprefix(candidate.prefix)
        if full_name.startswith(inner) or not full_name.startswith(candidate.prefix) or not re.match(own, name):
            continue
        if re.search(_COUNTERS, name):
            continue
        if isinstance(value, Tensor):
            state[name] = value
        elif "." in name and value is not None:
            raise InputError(f"the checkpoint holds {full_name} as {type(value).__name__}, not as a tensor")
    return state


def _strip_data_parallel(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _number_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace `blocks.CHUNK.BLOCK.`, as DINOv2's training code writes, by `blocks.BLOCK.`.

    There, BLOCK counts through all chunks. Where it starts again in each, the blocks are not known to be one sequence.
    """
    matches = (re.match(r"blocks\.(\d+)\.(\d+)\.", name) for name in state)
    numbers = sorted({(int(match[1]), int(match[2])) for match in matches if match})
    if [block for _, block in numbers] != list(range(len(numbers))):
        raise UnsupportedArchitecture(
            "the blocks are grouped, and numbered anew in each group (blocks.0.0, blocks.1.0), as in hierarchical models, "
            "which VisionTransformer does not support"
        )
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): value for name, value in state.items()}
