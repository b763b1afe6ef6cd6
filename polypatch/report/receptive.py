"""What a cell of each map looks at: gradients of its features with respect to the pixels."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["draw_fields", "receptive_fields"]


def receptive_fields(
    model: nn.Module, images: Float[Tensor, "batch 3 height width"], *, draws: int = 4
) -> list[tuple[int, Float[Tensor, "height width"]]]:
    """For each of a model's dense maps its stride and, for the cell in the middle, how strongly
    each pixel moves its features (Luo et al. 2016): the mean over the images and over ``draws``
    random directions in feature space of the gradient's absolute value, divided by its maximum.
    """
    model.eval()
    generator = torch.Generator().manual_seed(0)
    image = images.clone().requires_grad_()
    maps = model.features(image)  # type: ignore[operator]
    fields = []
    for value, stride in maps:
        row, column = value.shape[2] // 2, value.shape[3] // 2
        cell = value[:, :, row, column]
        total = torch.zeros(image.shape[-2:])
        for _ in range(draws):
            direction = torch.randn(cell.shape, generator=generator)
            (gradient,) = torch.autograd.grad((cell * direction).sum(), image, retain_graph=True)
            total += gradient.abs().mean((0, 1))
        fields.append((stride, total / total.max().clamp_min(1e-30)))
    return fields


def draw_fields(
    fields: list[tuple[int, Float[Tensor, "height width"]]], path: Path, *, decades: int = 5
) -> None:
    """A panel for each map, on a logarithmic scale over so many ``decades``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.5 * len(fields) + 0.8, 2.8), layout="constrained")
    shown = None
    for axes, (stride, field) in zip(figure.subplots(1, len(fields), squeeze=False)[0], fields):
        logs = field.clamp_min(10.0**-decades).log10()
        shown = axes.imshow(logs.numpy(), cmap="magma", vmin=-decades, vmax=0)
        axes.set_title(f"stride {stride}", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    if shown is not None:
        bar = figure.colorbar(shown, ax=figure.axes, shrink=0.85, ticks=[-decades, 0])
        bar.ax.set_yticklabels([f"10$^{{-{decades}}}$", "strongest"], fontsize=8)
    figure.savefig(path, dpi=90)
