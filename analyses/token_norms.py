"""How large the tokens are that pass from layer to layer, and whether some of them are artifacts.

Darcet et al. 2024, Vision Transformers Need Registers, arXiv:2309.16588, figures 3, 4 and 7. Expected: in large models that
were trained for long, some 2 % of the patch tokens have norms far above the others', from the middle layers on; DINOv2 models
smaller than ViT-L have none, nor have those that were trained with registers. As published here: the last layer has artifacts
if the model has as many parameters as ViT-L and no registers, else none. Of other trainings than DINOv2's the paper finds some
smaller models with artifacts (DeiT-III-B and OpenCLIP-B, figure 2), which would count as not as published here. A small model
of random weights has none, either.

    python -m analyses.token_norms --model demo
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analyses.study import Finding, keep
from vit_probe import token_norms
from vit_probe.cli import console as terminal
from vit_probe.cli import setup as steps
from vit_probe.cli.options import Formats, ImagePaths, Limit, Model, Out

LARGE = 3e8  # parameters; ViT-L has 304 million, ViT-B 86


def main(
    model: Model = "demo", images: ImagePaths = None, out: Out = Path("figures"), limit: Limit = 128, format: Formats = None
) -> None:
    """Draws how the norms of patch tokens are distributed in every layer, and finds the artifacts among them."""
    folder, formats, photographs = steps.prepare(images, None, out, limit, format)
    loaded = steps.load(model)
    result = token_norms(loaded, photographs)
    layers = result.to_dataframe()
    table = result.histogram().merge(layers.drop(columns=["module", "tokens"]), on="layer")
    grid = result.provenance["grid"]
    more = grid["num_prefix_tokens"] - grid["has_cls_token"]
    unnamed = 0 if more == grid["has_cls_token"] else more  # one beside a class token is DeiT's for distillation
    registers = getattr(getattr(loaded, "config", None), "num_registers", unnamed)
    finding = found(layers, sum(parameter.numel() for parameter in loaded.parameters()), registers)
    keep("token_norms", result.plot(), table, finding, result.provenance, folder, formats)


def found(layers: pd.DataFrame, parameters: int, registers: int) -> Finding:
    """Of the table of a model with so many parameters and registers."""
    last, some, registered = layers.iloc[-1], layers[layers["artifacts"] > 0], registers > 0
    text = f"Of {len(layers)} layers of a model with {parameters / 1e6:.1f} million parameters"
    text += f" and {registers} register{'s' * (registers > 1)}, " if registered else ", "
    if some.empty:
        text += f"none has artifacts; in the last, the highest norm is {last['highest'] / last['median']:.1f} times the median."
    else:
        most = some.iloc[int(some["artifacts"].to_numpy().argmax())]
        text += (
            f"{len(some)} have artifacts, the first of them layer {some['layer'].iloc[0]:.0f}; most are in layer "
            f"{most['layer']:.0f}: {100 * most['artifacts']:.2g} % of the patch tokens, in {most['artifact_images']:.0%} of "
            f"the images, with a norm of {most['artifact_norm']:.3g} where the others have {most['typical_norm']:.3g}. In the "
            f"last layer {100 * last['artifacts']:.2g} % are artifacts."
        )
    if parameters >= LARGE and not registered:
        return Finding(text, {"a large model has artifacts after the last layer": bool(last["artifacts"] > 0)})
    smaller = "with registers" if registered else "smaller than ViT-L"
    return Finding(text, {f"a model {smaller} has no artifacts after the last layer": bool(last["artifacts"] == 0)})


if __name__ == "__main__":
    terminal.run(main)
