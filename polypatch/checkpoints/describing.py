"""What a file of weights is, without running it: names and shapes are read, no values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .. import catalogue
from ..errors import PolypatchError
from ..nn import InputRequirements, sample_shape
from . import Loaded, load

__all__ = ["Description", "count_gflops", "describe"]


@dataclass(frozen=True)
class Description:
    """Of a file.

    Attributes:
        loaded: its model stays on the meta device.
        parameters: all of them, and those of the head.
        types: of the tensors in the file.
        gflops: of one image at ``resolution``, counted at 2 operations for a multiplication with
            an addition; None where they depend on the image, with the reason in ``note``.
    """

    path: Path
    size: int
    loaded: Loaded
    parameters: int
    head_parameters: int
    resolution: int
    requirements: InputRequirements
    gflops: float | None
    note: str = ""

    @property
    def title(self) -> str:
        if self.loaded.paper == "polypatch":
            return f"trained here: {self.loaded.config['spec']}"
        return catalogue.paper(self.loaded.paper).title

    @property
    def licence(self) -> str:
        known = self.loaded.paper != "polypatch"
        return catalogue.paper(self.loaded.paper).licence if known else ""


def describe(
    path: str | Path,
    *,
    config: dict | None = None,
    resolution: int | None = None,
) -> Description:
    """What a checkpoint is.

    Args:
        resolution: side of the square image whose operations are counted; default: what the
            authors evaluate on.

    Raises:
        PolypatchError: as :func:`polypatch.load`, but for values, which aren't looked at.
    """
    with torch.device("meta"):
        loaded = load(path, config=config, values=False)
    if loaded.task == "forecast":
        raise PolypatchError(f"{path} forecasts series; its config.json says how it was trained")
    model = loaded.model
    needs = getattr(model, "input_requirements", InputRequirements())
    side = resolution or getattr(model, "resolution", None) or loaded.preprocessing.resolution
    head = getattr(model, "head", None)
    gflops, note = count_gflops(model, needs.nearest(side, side), sample=sample_shape(model))
    file = Path(path) if not str(path).startswith("hub:") else Path()
    if file.is_dir():
        file = file / "model.safetensors"
    return Description(
        path=Path(str(path)),
        size=file.stat().st_size if file.is_file() else 0,
        loaded=loaded,
        parameters=sum(p.numel() for p in model.parameters()),
        head_parameters=sum(p.numel() for p in head.parameters())
        if isinstance(head, nn.Module)
        else 0,
        resolution=side,
        requirements=needs,
        gflops=gflops,
        note=note,
    )


def count_gflops(
    model: nn.Module, size: tuple[int, int], *, sample: tuple[int, ...] = (3,)
) -> tuple[float | None, str]:
    """Billions of operations for one image of ``size``, by shapes alone; or None and the reason."""
    image = torch.empty(1, *sample, *size, device="meta")
    training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model.to("meta")(image)
    except PolypatchError:
        raise
    except (RuntimeError, NotImplementedError):  # something asked for a value
        return None, "they depend on the image"
    finally:
        model.train(training)
    return counter.get_total_flops() / 1e9, ""
