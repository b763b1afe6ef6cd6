"""Token layouts of photos side by side, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PolypatchError
from ..nn import normalise
from ..spec import Part, Spec, create, parse, split_list
from .pictures import tokens_for_drawing

__all__ = ["cutters_of", "draw_layouts", "load_photo"]


def cutters_of(text: str, *, host: str, patch: int, resolution: int) -> list[tuple[str, nn.Module]]:
    """Models from a comma-separated list of techniques, ``grid`` for none, or run folders.

    Raises:
        PolypatchError: as :func:`polypatch.create` does.
    """
    models: list[tuple[str, nn.Module]] = []
    base = parse(host)
    options = {"patch": patch, **base.host.options} if base.host.name.startswith("vit-") else {}
    for item in split_list(text):
        if Path(item).is_dir():
            from ..compare import trained
            from ..training.runs import Run

            run = Run.open(Path(item))
            models.append((run.config.spec, trained(run)))
            continue
        part = parse(item)
        techniques = () if part.host.name == "grid" else (part.host, *part.techniques)
        spec = Spec(Part(base.host.name, options), (*base.techniques, *techniques))
        model = create(spec, classes=0, resolution=resolution, seed=0).eval()
        models.append((str(part), model))
    if not models:
        raise PolypatchError("name at least one tokenizer: --with grid,quadtree")
    for name, model in models:
        if not hasattr(model, "forward_features"):
            raise PolypatchError(f"{name} has no tokens with places, so there is nothing to draw")
    return models


def load_photo(path: Path, side: int, patch: int) -> Float[Tensor, "1 3 height width"]:
    """A photo with its shorter side about ``side``, its aspect kept, both sides multiples of
    ``patch``.

    Raises:
        PolypatchError: no such file, or no image in it.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise PolypatchError(f"there is no file {path}")
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise PolypatchError(f"{path} is no image that can be read ({error})") from error
    scale = side / min(image.size)
    width, height = (max(patch, round(s * scale / patch) * patch) for s in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(1, height, width, 3).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def draw_layouts(
    photos: Sequence[tuple[Path, Float[Tensor, "1 3 height width"]]],
    models: Sequence[tuple[str, nn.Module]],
    target: Path,
) -> list[list[int]]:
    """The photos, each followed by how every model cuts it, four pictures to a row; the token
    counts."""
    import matplotlib
    from matplotlib.figure import Figure

    counts: list[list[int]] = []
    rows: list[list[tuple[str, Any]]] = []
    pictures = len(models) + 1
    columns = -(-pictures // -(-pictures // 4))  # even rows of at most four
    for path, photo in photos:
        scale = max(1, round(640 / max(photo.shape[-2:])))
        plain = F.interpolate(photo, scale_factor=scale, mode="bicubic", antialias=True)
        cells, count = [(path.name, plain)], []
        for name, model in models:
            try:
                tokens = tokens_for_drawing(model, normalise(photo))
            except PolypatchError as error:
                raise PolypatchError(f"{name} on {path}: {error}") from error
            count.append(int(tokens.counts[0]) - tokens.prefix)
            drawn = tokens.draw(photo, fill=0.6, scale=scale)
            cells.append((f"{name}\n{count[-1]} tokens", drawn))
        counts.append(count)
        rows += [cells[k : k + columns] for k in range(0, len(cells), columns)]
    width = 3.2
    heights = [width * row[0][1].shape[-2] / row[0][1].shape[-1] + 0.42 for row in rows]
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(width * columns, sum(heights)), layout="constrained")
        grid = figure.subplots(
            len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": heights}
        )
        for axes in grid.flat:
            axes.set_axis_off()
        for axes_row, row in zip(grid, rows):
            for axes, (title, picture) in zip(axes_row, row):
                axes.imshow(picture[0].clamp(0, 1).permute(1, 2, 0).numpy())
                axes.set_title(title, fontsize=9, color="#111827")
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}")
        figure.savefig(beside, dpi=110, format=target.suffix[1:].lower())
        beside.replace(target)
    return counts
