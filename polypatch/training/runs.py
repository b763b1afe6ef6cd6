"""Runs on disk: a folder per run, addressed by what it computes.

``runs/<spec>-<address>/`` holds ``config.json`` (what is computed), ``plan.json`` (how many steps a
time budget came to on this machine), ``metrics.jsonl`` (one JSON object a line), ``checkpoint/``
(everything needed to go on), and in the end ``model.safetensors`` and ``result.json``. The address
is a hash of the configuration, so asking for the same thing again finds it: finished runs are
reused, interrupted ones continued. Files are written beside and renamed, so a run that is killed
at any moment leaves whole files only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PolypatchError
from .recipe import Recipe

__all__ = ["Run", "RunConfig", "write_file", "write_json"]


@dataclass(frozen=True)
class RunConfig:
    """All that determines a run's outcome.

    ``data`` is what the user wrote, ``data_fingerprint`` what it held at the time; the same folder
    with other files is another run. ``resolution`` and ``classes`` are of images, 0 for series;
    ``lookback``, ``horizon``, ``series``, ``season`` and ``protocol`` of series
    (:class:`~polypatch.data.windows.ForecastData`).
    """

    spec: str
    data: str
    data_fingerprint: str
    resolution: int
    classes: int
    seed: int
    budget: str
    recipe: Recipe = field(default_factory=Recipe)
    init: str = ""  # a checkpoint to start from
    task: str = "classify"
    lookback: int = 0
    horizon: int = 0
    series: int = 0
    season: int = 1
    protocol: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        return cls(**{**values, "recipe": Recipe(**values["recipe"])})

    @property
    def address(self) -> str:
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Run:
    """A run's folder."""

    folder: Path

    @classmethod
    def of(cls, config: RunConfig, root: Path) -> Run:
        """The run that computes ``config``; its folder is made if it isn't there."""
        words = re.sub(r"[^A-Za-z0-9]+", "-", config.spec).strip("-")[:60]
        run = cls(root / f"{words}-s{config.seed}-{config.address}")
        run.folder.mkdir(parents=True, exist_ok=True)
        if not run.config_file.exists():
            write_json(run.config_file, config.to_dict())
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run.

        Raises:
            PolypatchError: no such folder, or no run in it.
        """
        if not (path / "config.json").is_file():
            near = sorted(p.parent.name for p in path.parent.glob("*/config.json"))
            hint = f"; runs there: {', '.join(near[:6])}" if near else ""
            raise PolypatchError(f"there is no run in {path}{hint}")
        return cls(path)

    @property
    def config_file(self) -> Path:
        return self.folder / "config.json"

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def model_file(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def config(self) -> RunConfig:
        return RunConfig.from_dict(json.loads(self.config_file.read_text()))

    @property
    def plan(self) -> dict[str, Any] | None:
        return _read(self.folder / "plan.json")

    @property
    def result(self) -> dict[str, Any] | None:
        """Set once the run is finished."""
        return _read(self.folder / "result.json")

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        write_json(self.folder / "plan.json", plan)

    def write_result(self, result: Mapping[str, Any]) -> None:
        write_json(self.folder / "result.json", result)

    def metrics(self) -> list[dict[str, Any]]:
        """All complete lines; a line torn by a kill is left out."""
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text().splitlines()
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def rewind(self, step: int) -> None:
        """Drop metric lines behind ``step``, which a resumed run will write again."""
        kept = [row for row in self.metrics() if row.get("step", 0) <= step]
        content = "".join(json.dumps(row) + "\n" for row in kept)
        write_file(self.metrics_file, content.encode())

    # ---- checkpoints ---------------------------------------------------------------------------

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """Step and folder of the newest whole checkpoint."""
        found = [
            (int(path.name.removeprefix("step-")), path)
            for path in self.checkpoints.glob("step-*")
            if path.is_dir()
        ]
        return max(found, default=None)

    def fresh_checkpoint(self) -> Path:
        """A scratch folder to write a checkpoint into."""
        scratch = self.checkpoints / "writing"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        return scratch

    def publish_checkpoint(self, scratch: Path, step: int) -> None:
        """Make a written folder the newest checkpoint, then drop the older ones."""
        target = self.checkpoints / f"step-{step:08d}"
        shutil.rmtree(target, ignore_errors=True)
        os.replace(scratch, target)
        for path in self.checkpoints.glob("step-*"):
            if path != target:
                shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, as a whole or not at all."""
    write_file(path, f"{json.dumps(value, indent=2, sort_keys=True)}\n".encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(beside, path)


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None
