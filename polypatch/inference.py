"""Running a loaded model over files: classes, masks, features.

Files that are no images are named and left out; everything else of a batch still comes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from .checkpoints import Loaded
from .data.decode import Undecodable, decode_clip, decode_image, decode_whole
from .errors import PolypatchError
from .nn import normalise, sample_shape

__all__ = [
    "Pictures",
    "class_names",
    "classify",
    "csv_text",
    "expand",
    "feature_maps",
    "json_text",
    "pooled_features",
    "segment",
    "side_of",
    "unique_names",
]


def expand(files: Iterable[Path]) -> list[Path]:
    """Files, and all files below the folders among them.

    Raises:
        PolypatchError: a path that isn't there, or a folder without files.
    """
    paths: list[Path] = []
    for path in files:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != ".")
            if not inside:
                raise PolypatchError(f"there are no files in {path}")
            paths += inside
        elif path.exists():
            paths.append(path)
        else:
            raise PolypatchError(f"there is no file {path}")
    return paths


def side_of(loaded: Loaded, resolution: int | None = None) -> int:
    """Side of the square images that the model gets: ``resolution``, or what its weights expect.

    Raises:
        PolypatchError: a side that the network doesn't permit, or no network on images.
    """
    if loaded.task == "forecast":
        raise PolypatchError(
            "this model forecasts series, not images; `polypatch forecast` takes tables of them"
        )
    side = resolution or getattr(loaded.model, "resolution", loaded.preprocessing.resolution)
    needs = getattr(loaded.model, "input_requirements", None)
    if needs is not None and needs.nearest(side, side) != (side, side):
        right = max(needs.nearest(side, side))
        raise PolypatchError(f"this network takes no {side}×{side}; use --resolution {right}")
    return side


@dataclass
class Pictures:
    """Image files as batches of what a model expects; ``bad`` collects what couldn't be read."""

    paths: Sequence[Path]
    loaded: Loaded
    side: int
    batch: int = 32
    bad: list[str] = field(default_factory=list)
    done: Callable[[int], None] = lambda count: None
    """Called with the number of files that were dealt with, batch by batch."""

    def __iter__(self) -> Iterator[tuple[list[Path], Float[Tensor, "batch 3 *frames side side"]]]:
        looks = self.loaded.preprocessing
        device = next(self.loaded.model.parameters()).device
        for start in range(0, len(self.paths), self.batch):
            images, names = [], []
            for path in self.paths[start : start + self.batch]:
                try:
                    pixels = self._decoded(path)
                except (Undecodable, PolypatchError, OSError) as error:
                    self.bad.append(f"{path}: {error}")
                    continue
                images.append(torch.from_numpy(pixels.copy()).float() / 255)
                names.append(path)
            if images:
                batch = torch.stack(images)
                if batch.ndim == 5:  # frames are normalised one by one
                    clips = normalise(batch.transpose(1, 2), looks.mean, looks.std)
                    batch = clips.transpose(1, 2)
                else:
                    batch = normalise(batch, looks.mean, looks.std)
                yield names, batch.to(device)
            self.done(len(self.paths[start : start + self.batch]))

    def _decoded(self, path: Path) -> UInt8[np.ndarray, "3 *frames side side"]:
        looks, shape = self.loaded.preprocessing, sample_shape(self.loaded.model)
        asked = {
            "name": str(path), "resolution": self.side, "crop": looks.crop,
            "interpolation": looks.interpolation,
        }  # fmt: skip
        if len(shape) == 2:
            return decode_clip(path, frames=shape[1], **asked)
        return decode_image(path, **asked)


def class_names(loaded: Loaded, file: Path | None = None, *, count: int) -> list[str]:
    """Names of the model's ``count`` classes: those in ``file`` (a line each, or a JSON list),
    those that the checkpoint says, ImageNet's for 1,000 classes, else their numbers.

    Raises:
        PolypatchError: a file with another number of names.
    """
    if file is None:
        if loaded.classes:
            return list(loaded.classes)
        if count == 1000:
            text = Path(__file__).with_name("data").joinpath("imagenet.txt").read_text("utf-8")
            return text.splitlines()
        return [str(number) for number in range(count)]
    try:
        text = file.read_text(encoding="utf-8")
        names = json.loads(text) if file.suffix == ".json" else text.splitlines()
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PolypatchError(f"{file} can't be read as a list of names: {error}") from error
    if not isinstance(names, list) or len(names) != count:
        found = len(names) if isinstance(names, list) else "no list of"
        raise PolypatchError(f"{file} has {found} names, the model has {count} classes")
    return [str(name) for name in names]


def classify(
    pictures: Pictures, *, top: int, labels: Path | None = None
) -> Iterator[dict[str, Any]]:
    """For each readable file its ``top`` classes with probabilities, best first."""
    names: list[str] | None = None
    for paths, images in pictures:
        with torch.inference_mode():
            chances = pictures.loaded.model(images).float().softmax(1).cpu()
        if names is None:
            names = class_names(pictures.loaded, labels, count=chances.shape[1])
        best = chances.topk(min(top, chances.shape[1]))
        for path, values, classes in zip(paths, best.values.tolist(), best.indices.tolist()):
            guesses = [
                {"class": names[number], "probability": round(value, 6)}
                for number, value in zip(classes, values)
            ]
            yield {"file": str(path), "predictions": guesses}


def csv_text(rows: Sequence[dict[str, Any]], top: int) -> str:
    """Rows of :func:`classify`: file, then class and probability, best first."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    heads = [f"{word}_{k}" for k in range(1, top + 1) for word in ("class", "probability")]
    writer.writerow(["file", *heads])
    for row in rows:
        flat = [v for guess in row["predictions"] for v in (guess["class"], guess["probability"])]
        writer.writerow([row["file"], *flat])
    return buffer.getvalue()


def json_text(rows: Sequence[dict[str, Any]]) -> str:
    return json.dumps(rows, indent=2) + "\n"


def pooled_features(
    pictures: Pictures,
) -> tuple[list[Path], Float[Tensor, "images dim"]]:
    """What the classifier reads, one row an image.

    Raises:
        PolypatchError: no image could be read.
    """
    names: list[Path] = []
    rows: list[Tensor] = []
    for paths, images in pictures:
        with torch.inference_mode():
            rows.append(_pooled(pictures.loaded.model, images).float().cpu())
        names += paths
    if not rows:
        raise PolypatchError("none of the files is an image")
    return names, torch.cat(rows)


def _pooled(model: nn.Module, images: Tensor) -> Tensor:
    if hasattr(model, "pooled"):
        return model.pooled(images).flatten(1)  # type: ignore[operator]
    if hasattr(model, "pooling") and hasattr(model, "forward_features"):
        return model.pooling(model.forward_features(images)).flatten(1)  # type: ignore[operator]
    raise PolypatchError(f"{type(model).__name__} has no features in front of a classifier")


def feature_maps(pictures: Pictures) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """The dense maps of each image, by ``stride<pixels>`` (numbered where strides repeat)."""
    model = pictures.loaded.model
    if not hasattr(model, "features"):
        raise PolypatchError(f"{type(model).__name__} gives no dense maps")
    for paths, images in pictures:
        with torch.inference_mode():
            maps = model.features(images)  # type: ignore[operator]
        strides = [stride for _, stride in maps]
        names = [
            f"stride{stride}" + (f".{k}" if strides.count(stride) > 1 else "")
            for k, stride in enumerate(strides)
        ]
        for row, path in enumerate(paths):
            yield (
                path,
                {n: m.map[row].float().cpu().contiguous().clone() for n, m in zip(names, maps)},
            )


def segment(pictures: Pictures) -> Iterator[tuple[Path, Any, Any]]:
    """For each readable file its label map (a PIL picture of class numbers, at the photo's own
    size, with a palette) and the photo with the map laid over it. One photo at a time."""
    from PIL import Image

    looks = pictures.loaded.preprocessing
    device = next(pictures.loaded.model.parameters()).device
    for path in pictures.paths:
        pictures.done(1)
        try:
            pixels = decode_whole(path, name=str(path))
        except (Undecodable, PolypatchError, OSError) as error:
            pictures.bad.append(f"{path}: {error}")
            continue
        image = torch.from_numpy(pixels.copy()).float()[None] / 255
        with torch.inference_mode():
            logits = pictures.loaded.model(normalise(image, looks.mean, looks.std).to(device))
        labels = logits[0].argmax(0).to(torch.uint8).cpu().numpy()
        mask = Image.fromarray(labels).convert("P")
        mask.putpalette(PALETTE)
        colours = np.array(PALETTE, dtype=np.float32).reshape(-1, 3)[labels]
        shown = (labels > 0)[..., None]
        photo = pixels.transpose(1, 2, 0)
        overlay = np.where(shown, 0.5 * photo + 0.5 * colours, photo).astype(np.uint8)
        yield path, mask, Image.fromarray(overlay)


#: class 0 is black in maps and left out in overlays; the others are the Okabe–Ito colours, which
#: colour-blind people tell apart, repeated
PALETTE = [0, 0, 0] + [
    value
    for k in range(255)
    for value in (
        (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178),
        (213, 94, 0), (204, 121, 167),
    )[k % 7]
]  # fmt: skip


def unique_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A name without suffix for each file, numbered where two would be the same."""
    names: dict[Path, str] = {}
    taken: dict[str, int] = {}
    for path in paths:
        taken[path.stem] = taken.get(path.stem, 0) + 1
        names[path] = path.stem if taken[path.stem] == 1 else f"{path.stem}-{taken[path.stem]}"
    return names
