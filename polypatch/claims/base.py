"""What a claim is, how it is tested, and how a verdict is reached.

A claim's file defines ``CLAIM``: the sentence, the metric, margin and number of seeds that were set
before looking, and a function that measures the metric once per seed. The verdict follows from the
95 % interval of the metric over seeds alone:

* *holds*: the whole interval lies above the margin;
* *does not hold here*: the whole interval lies below it;
* *too close to call*: the margin lies inside.

"Here" means at this scale: minutes on two cores. A claim about ImageNet accuracy can't be tested
so; each file says which claim of its paper was chosen, and why it can.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..compare import Job, View, run_jobs, trained
from ..data import ImageData, load_images
from ..errors import PolypatchError, suggest
from ..hosts import ViT
from ..report.statistics import Interval, interval
from ..spec import parse
from ..training.recipe import Recipe
from ..training.runs import Run, RunConfig

__all__ = [
    "Claim",
    "Evidence",
    "Lab",
    "Outcome",
    "View",
    "claim_of",
    "claim_slugs",
    "test",
    "verdict",
]


@dataclass(frozen=True)
class Evidence:
    """What an experiment found.

    ``values``: the claim's metric, once per seed (differences: method minus baseline of the same
    seed). ``table``: what was measured for each arm, for the reader.
    """

    values: tuple[float, ...]
    table: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    remark: str = ""


@dataclass(frozen=True)
class Claim:
    """A claim that this scale can test.

    Attributes:
        says: the paper's claim in our words, with its place in the paper.
        metric: what is measured, with unit.
        margin: the metric must be above this; set before looking.
        experiment: (lab) → evidence.
        seeds: how many the verdict rests on; more where runs are cheap and differences small.
    """

    slug: str
    says: str
    metric: str
    margin: float
    experiment: Callable[[Lab], Evidence]
    seeds: int = 3


@dataclass(frozen=True)
class Outcome:
    claim: Claim
    evidence: Evidence
    interval: Interval
    verdict: str
    seconds: float


@dataclass(frozen=True)
class Lab:
    """Where experiments train: the machinery of ``compare``, kept runs included."""

    root: Path
    seeds: int = 3
    jobs: int | None = None
    device: str | None = None
    refresh: Callable[[Sequence[Job]], None] = lambda jobs: None

    def train(
        self,
        specs: Sequence[str],
        *,
        data: str = "bundled:photos",
        resolution: int = 32,
        budget: str = "200steps",
        recipe: Recipe | None = None,
        view: View | None = None,
    ) -> dict[str, tuple[Run, ...]]:
        """Runs of each spec, one per seed, trained under the same budget and data order; on what
        ``view`` makes of the data, if there is one. Augmentation comes behind the view."""
        source = load_images(data, resolution=resolution)
        if view is not None:
            source = view(source)
        work = [
            Job(
                RunConfig(
                    spec=str(parse(spec)),
                    data=data if view is None else source.name,
                    data_fingerprint=source.fingerprint,
                    resolution=resolution,
                    classes=len(source.classes),
                    seed=seed,
                    budget=budget,
                    recipe=recipe or Recipe(),
                ),
                self.root,
                self.device,
                source=data,
                view=view,
            )
            for seed in range(self.seeds)
            for spec in specs
        ]
        run_jobs(work, jobs=self.jobs, refresh=lambda: self.refresh(work))
        return {
            spec: tuple(job.run for job in work if job.config.spec == str(parse(spec)))
            for spec in specs
        }

    @staticmethod
    def accuracy(runs: Sequence[Run]) -> list[float]:
        """Test accuracy of each run, in per cent."""
        return [100 * float((run.result or {})["accuracy"]) for run in runs]

    @staticmethod
    def host(run: Run) -> ViT:
        """The trained model of a run, in eval mode."""
        model = trained(run)
        assert isinstance(model, ViT)
        return model

    @staticmethod
    def data(run: Run) -> ImageData:
        """What a run was trained on, where that was no view."""
        config = run.config
        return load_images(config.data, resolution=config.resolution, seed=config.seed)


def verdict(values: Sequence[float], margin: float) -> str:
    """From the interval of the metric over seeds; see the module's docstring.

    Values that are all equal (an exact property) have an interval of width 0.
    """
    if len(values) < 3:
        return "too close to call"
    found = interval(values)
    if found.mean - found.half > margin:
        return "holds"
    if found.mean + found.half < margin:
        return "does not hold here"
    return "too close to call"


def claim_slugs() -> list[str]:
    """Papers that have a claim to test: those whose file here defines one (none is imported)."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(
        file.stem.replace("_", "-")
        for file in files
        if "\nCLAIM = " in file.read_text(encoding="utf-8")
    )


def claim_of(slug: str) -> Claim:
    """
    Raises:
        PolypatchError: no claim under that name.
    """
    known = claim_slugs()
    if slug not in known:
        raise PolypatchError(
            f"there is no claim of {slug!r} to test{suggest(slug, known, kind='claims')}"
        )
    return importlib.import_module(f"{__package__}.{slug.replace('-', '_')}").CLAIM


def test(claim: Claim, lab: Lab) -> Outcome:
    """Run the experiment and judge it."""
    began = time.perf_counter()
    evidence = claim.experiment(lab)
    return Outcome(
        claim,
        evidence,
        interval(evidence.values),
        verdict(evidence.values, claim.margin),
        time.perf_counter() - began,
    )


def markdown(outcome: Outcome) -> str:
    """A section of ``docs/claims.md``."""
    claim, evidence = outcome.claim, outcome.evidence
    lines = [
        f"## {claim.slug}: {outcome.verdict}",
        "",
        f"**Claim.** {claim.says}",
        "",
        f"**Metric.** {claim.metric}; it has to be above {claim.margin:g}.",
        "",
        f"**Found.** {_number(outcome.interval)} (mean and 95 % interval over "
        f"{outcome.interval.count} seeds; each: {', '.join(f'{v:.3g}' for v in evidence.values)}).",
        "",
    ]
    if evidence.table:
        columns = list(dict.fromkeys(c for row in evidence.table.values() for c in row))
        lines += [
            "| | " + " | ".join(columns) + " |",
            "|---" * (len(columns) + 1) + "|",
            *(
                f"| {name} | " + " | ".join(row.get(c, "") for c in columns) + " |"
                for name, row in evidence.table.items()
            ),
            "",
        ]
    if evidence.remark:
        lines += [evidence.remark, ""]
    lines += [f"`polypatch claim {claim.slug}`, {outcome.seconds:.0f} s.", ""]
    return "\n".join(lines)


def write_section(path: Path, outcome: Outcome) -> None:
    """Put the outcome into a page of claims in place of the older one of the same paper."""
    text = path.read_text(encoding="utf-8") if path.exists() else _HEADER
    head, *sections = text.split("\n## ")
    kept = {s.split(":")[0]: s.rstrip() for s in sections}
    kept[outcome.claim.slug] = markdown(outcome)[3:].rstrip()
    body = "".join(f"\n\n## {kept[slug]}" for slug in sorted(kept))
    beside = path.with_name(f".{path.name}")
    beside.write_text(head.rstrip() + body + "\n", encoding="utf-8")
    beside.replace(path)


_HEADER = """# Claims

Each paper's headline claim, as far as minutes on two cores can test it. Verdicts follow from the
95 % interval over seeds and a margin set beforehand: *holds* if the whole interval lies above the
margin, *does not hold here* if it lies below, else *too close to call*. "Here" is this scale:
small models on photographs that come with the dependencies. `polypatch claim SLUG` runs one again
and writes it here.
"""


def _number(value: Interval) -> str:
    half = "" if math.isnan(value.half) else f" ± {value.half:.2g}"
    return f"{value.mean:.3g}{half}"
