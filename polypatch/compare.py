"""Train several models under one budget, measure what each costs, say which is worth it.

The work is a list of independent runs (a spec with a seed), each in a folder of its own
(``training/runs.py``), so it can be shared by processes or a Ray cluster, stopped and called again:
what is finished is reused, what was interrupted goes on. The folder is also how progress travels:
whoever trains appends to ``metrics.jsonl``, whoever watches reads its last line.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from .data import ImageData, load_images
from .errors import PolypatchError
from .nn import normalise
from .report.statistics import Interval, difference, interval
from .spec import create, parse
from .training.budget import Budget
from .training.cost import Cost, measure
from .training.recipe import Recipe
from .training.runs import Run, RunConfig, write_file

__all__ = [
    "DEFAULT_SPECS",
    "Candidate",
    "Comparison",
    "Job",
    "View",
    "compare",
    "recommend",
    "run_jobs",
    "trained",
]

#: Without arguments: the grid at two patch sizes, the adaptive tokenizers, token merging.
DEFAULT_SPECS = (
    "vit-nano(patch=8)",
    "vit-nano(patch=4)",
    "vit-nano(patch=4)+dart(tokens=32)",
    "vit-nano(patch=8)+spformer",
    "vit-nano(patch=4)+elastic-vit",
    "vit-nano(patch=4)+quadtree",
    "vit-nano(patch=4)+tome",
)


#: What is made of a source before it is trained on: fewer samples, moved pixels. A function of a
#: module, as workers get it by name; the source that it gives has a name and a fingerprint of its
#: own, which keep its runs apart from others.
View = Callable[[ImageData], ImageData]


@dataclass(frozen=True)
class Job:
    """One run to make, and where.

    With a ``view``, the run's data is what the view makes of ``source``."""

    config: RunConfig
    root: Path
    device: str | None = None
    source: str = ""
    view: View | None = None

    @property
    def run(self) -> Run:
        return Run.of(self.config, self.root)


@dataclass(frozen=True)
class Candidate:
    """What came out for one spec: per seed from the runs, costs measured afterwards, alone."""

    spec: str
    runs: tuple[Run, ...]
    cost: Cost

    def per_seed(self, name: str) -> list[float]:
        return [float(run.result[name]) for run in self.runs if run.result is not None]

    @property
    def accuracy(self) -> Interval:
        return interval(self.per_seed("accuracy"))

    @property
    def tokens(self) -> tuple[float, float] | None:
        """Mean tokens per sample and their spread over samples, averaged over seeds."""
        results = [run.result or {} for run in self.runs]
        if any(result.get("tokens") is None for result in results):
            return None
        means, spreads = self.per_seed("tokens"), self.per_seed("tokens_spread")
        return sum(means) / len(means), sum(spreads) / len(spreads)

    @property
    def throughput(self) -> float:
        """Training images per second."""
        values = self.per_seed("images_per_second")
        return sum(values) / len(values)

    @property
    def seconds(self) -> float:
        values = self.per_seed("seconds")
        return sum(values) / len(values)


@dataclass(frozen=True)
class Comparison:
    """All candidates, in the order asked for, and what they were compared on."""

    candidates: tuple[Candidate, ...]
    data: ImageData
    budget: str
    seeds: int
    recipe: Recipe
    recommendation: str
    seconds: float
    notes: tuple[str, ...] = field(default=())


def compare(
    specs: Sequence[str] = DEFAULT_SPECS,
    *,
    data: str = "bundled:photos",
    budget: str = "130steps",
    seeds: int = 3,
    resolution: int | None = None,
    recipe: Recipe | None = None,
    root: Path = Path("runs"),
    jobs: int | None = None,
    device: str | None = None,
    ray: str | None = None,
    watch: Callable[[list[Job]], Any] | None = None,
    reading: Callable[[int, int, str], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Train every spec with every seed under the same budget and measure what each costs.

    Args:
        budget: per run, see :class:`~polypatch.training.budget.Budget`.
        jobs: runs at a time; default: one per core on a CPU (small models use one core best), one
            on an accelerator.
        ray: address of a Ray cluster, ``"local"`` to start one here.
        watch: given the list of jobs, a context manager whose value is called again and again
            while they run, to show progress.
        reading: called with (done, total, what) while the data is read.
        say: called with a sentence at each stage.

    Raises:
        PolypatchError: before any training, for anything wrong with a spec or the data.
    """
    began = time.perf_counter()
    if seeds < 1:
        raise PolypatchError(f"a comparison needs at least one seed, got seeds={seeds}")
    if jobs is not None and jobs < 1:
        raise PolypatchError(f"a comparison needs at least one run at a time, got jobs={jobs}")
    amount = Budget.parse(budget).words
    recipe = recipe or Recipe(lr=2e-3)
    canonical = list(dict.fromkeys(str(parse(text)) for text in specs))
    if not canonical:
        raise PolypatchError("there is nothing to compare; name at least one model: vit-nano+dart")
    say(f"Reading {data} …")
    source = load_images(data, resolution=resolution, progress=reading)
    for note in source.notes:
        say(note)
    for spec in canonical:  # everything that can be wrong with a spec shows here
        _check_model(spec, source)
    work = [
        Job(
            RunConfig(
                spec=spec,
                data=data,
                data_fingerprint=source.fingerprint,
                resolution=source.resolution,
                classes=len(source.classes),
                seed=seed,
                budget=budget,
                recipe=recipe,
            ),
            root,
            device,
        )
        for seed in range(seeds)
        for spec in canonical
    ]
    finished = sum(job.run.result is not None for job in work)
    say(
        f"Training {len(canonical)} model{'s'[: len(canonical) != 1]} × {seeds} "
        f"seed{'s'[: seeds != 1]}, {amount} each, on "
        f"{len(source.classes)} classes at {source.resolution}×{source.resolution}"
        + (f" ({finished} of {len(work)} runs are there already)" if finished else "")
    )
    show = watch(work) if watch is not None else contextlib.nullcontext(lambda: None)
    with show as refresh:
        run_jobs(work, jobs=jobs, ray=ray, refresh=refresh)
    say("Measuring operations, latency and memory …")
    candidates = []
    for spec in canonical:
        runs = tuple(job.run for job in work if job.config.spec == spec)
        candidates.append(Candidate(spec, runs, _cost_of(runs[0], source, device)))
    return Comparison(
        candidates=tuple(candidates),
        data=source,
        budget=budget,
        seeds=seeds,
        recipe=recipe,
        recommendation=recommend(candidates),
        seconds=time.perf_counter() - began,
        notes=source.notes,
    )


def trained(run: Run, *, device: str | None = None) -> torch.nn.Module:
    """The model of a finished run, in eval mode."""
    from .checkpoints import load

    model = load(run.model_file).model
    return model if device is None else model.to(device)


def recommend(candidates: Sequence[Candidate]) -> str:
    """Which one to take, in words that follow from the numbers.

    The most accurate candidate is compared with each other by the interval of the difference over
    seeds. What to take is the cheapest that can't be told from the best, if by that interval it
    loses 10 points at the very most.
    """
    if len(candidates) == 1:
        only = candidates[0]
        return (
            f"{only.spec} reaches {_percent(only.accuracy)}; there is nothing to compare it with."
        )
    ranked = sorted(candidates, key=lambda c: -c.accuracy.mean)
    best = ranked[0]
    best_scores = best.per_seed("accuracy")
    if len(best_scores) < 2:
        return (
            f"{best.spec} scored highest ({_percent(best.accuracy)}), but with one seed nobody can "
            "say what is noise; use --seeds 3 or more."
        )
    gaps = {c.spec: difference(best_scores, c.per_seed("accuracy")) for c in ranked[1:]}
    level = [best, *(c for c in ranked[1:] if not gaps[c.spec].clear)]
    # "Can't be told apart" says little of a candidate that may be far worse.
    close = [c for c in level[1:] if gaps[c.spec].high <= 0.1]
    if level[1:] and not close:
        noise = max(gaps[c.spec].half for c in level[1:])
        return (
            f"Too few or too short runs to choose: {best.spec} scored highest "
            f"({_percent(best.accuracy)}), but differences of up to {100 * noise:.0f} points are "
            "noise here; use more --seeds or a larger --budget."
        )
    choice = min([best, *close], key=lambda c: c.cost.gflops)
    if choice is not best:
        gap = gaps[choice.spec]
        saving = best.cost.gflops / max(choice.cost.gflops, 1e-12)
        return (
            f"Take {choice.spec}: {_percent(choice.accuracy)} with {saving:.1f} times fewer "
            f"operations than {best.spec}, whose lead of {100 * gap.mean:.1f} points is within the "
            f"noise (± {100 * gap.half:.1f})."
        )
    text = f"Take {best.spec}: it has the highest accuracy ({_percent(best.accuracy)})"
    if close:
        others = ", ".join(c.spec for c in close)
        return f"{text}, and it is the cheapest of those within the noise of it ({others})."
    runner = ranked[1]
    gap = gaps[runner.spec]
    return (
        f"{text}, clearly ahead of {runner.spec} by "
        f"{100 * gap.mean:.1f} ± {100 * gap.half:.1f} points."
    )


def _percent(value: Interval) -> str:
    half = "" if value.half != value.half else f" ± {100 * value.half:.1f}"
    return f"{100 * value.mean:.1f}{half} %"


# ---- doing the work ----------------------------------------------------------------------------


def run_jobs(
    work: Sequence[Job],
    *,
    jobs: int | None = None,
    ray: str | None = None,
    refresh: Callable[[], None] = lambda: None,
) -> None:
    """Finish all jobs, several at a time; call ``refresh`` every fifth of a second meanwhile.

    Raises the first error of a job, after the others that run already have ended.
    """
    left = [job for job in work if job.run.result is None]
    if not left:
        refresh()
        return
    if ray is not None:
        _on_ray(left, ray, refresh)
        return
    cores = _cores()
    on_cpu = left[0].device == "cpu" or (
        left[0].device is None and not torch.accelerator.is_available()
    )
    jobs = min(jobs or (cores if on_cpu else 1), len(left))
    if jobs == 1:  # no worker to start
        for job in left:
            run_job(job, progress=lambda *_: refresh())
        refresh()
        return
    # Spawned, not forked: forking a process that has used torch's threads may hang.
    with ProcessPoolExecutor(
        jobs,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(max(1, cores // jobs), os.getpid()),
    ) as pool:
        futures = [pool.submit(run_job, job) for job in left]
        try:
            _wait(futures, refresh)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_job(job: Job, progress: Callable[..., None] | None = None) -> dict[str, Any]:
    """Train one run to its end (or find it finished); its result."""
    from .training.loop import train

    data = _data(job)
    run = train(job.config, data, root=job.root, device=job.device, progress=progress)
    assert run.result is not None
    return run.result


def _data(job: Job) -> ImageData:
    config, name = job.config, job.source or job.config.data
    # Only bundled sources depend on the seed; a folder need not be decoded again for each.
    seed = config.seed if name.startswith("bundled:") else 0
    data = _load(name, config.resolution, seed)
    return data if job.view is None else job.view(data)


@lru_cache(maxsize=4)
def _load(data: str, resolution: int, seed: int) -> ImageData:
    return load_images(data, resolution=resolution, seed=seed)


def _start_worker(threads: int, parent: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """End this worker when the process that wants its results is gone. A pool's workers wait for
    work forever if their parent is killed; what they were at goes on from its checkpoint."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _wait(futures: Sequence[Future], refresh: Callable[[], None]) -> None:
    while not all(future.done() for future in futures):
        refresh()
        for future in futures:
            if future.done() and future.exception() is not None:
                future.result()
        time.sleep(0.2)
    for future in futures:
        future.result()
    refresh()


def _on_ray(work: Sequence[Job], address: str, refresh: Callable[[], None]) -> None:
    """Hand the runs to a Ray cluster. Workers that don't share our disk send their folder back."""
    try:
        import ray  # type: ignore[import-not-found]
    except ImportError as error:
        raise PolypatchError("--ray needs the ray package: pip install 'polypatch[ray]'") from error
    started = not ray.is_initialized()
    if started:
        try:
            if address not in ("local", "auto"):  # Ray itself tries for minutes before it gives up
                place = urlsplit(address if "://" in address else f"ray://{address}")
                socket.create_connection((place.hostname, place.port), timeout=10).close()
            ray.init(address=address, log_to_driver=False)
        except (OSError, ValueError) as error:  # ValueError: this is no address
            raise PolypatchError(
                f"no Ray cluster answers at {address!r}; give its head node as host:port, or local "
                f"to start one here ({error})"
            ) from error
    try:
        remote = ray.remote(_run_and_send)
        pending = [remote.remote(job) for job in work]
        while pending:
            done, pending = ray.wait(pending, timeout=0.2)
            for name, files in ray.get(done):
                folder = work[0].root / name
                folder.mkdir(parents=True, exist_ok=True)
                for file, content in files.items():
                    if not (folder / file).exists():
                        write_file(folder / file, content)
            refresh()
    finally:
        if started:
            ray.shutdown()


def _run_and_send(job: Job) -> tuple[str, dict[str, bytes]]:
    run_job(job)
    folder = job.run.folder
    names = ("config.json", "plan.json", "metrics.jsonl", "model.safetensors", "result.json")
    return folder.name, {n: (folder / n).read_bytes() for n in names if (folder / n).exists()}


def _check_model(spec: str, data: ImageData) -> None:
    """Build the model and send two images through it."""
    model = create(spec, classes=len(data.classes), resolution=data.resolution, seed=0).eval()
    images, _ = data.test.read(torch.arange(min(2, len(data.test))))
    try:
        with torch.no_grad():
            model(images)
    except PolypatchError as error:
        raise PolypatchError(f"{spec}: {error}") from error


def _cost_of(run: Run, data: ImageData, device: str | None) -> Cost:
    """Costs of a run's trained model, measured once and kept beside its result."""
    result = run.result or {}
    if "cost" in result:
        return Cost(**result["cost"])
    model = trained(run, device=device)
    images, _ = data.test.read(torch.arange(min(32, len(data.test))))
    images = normalise(images, data.mean, data.std).to(next(model.parameters()).device)
    cost = measure(model, images)
    run.write_result({**result, "cost": cost.to_dict()})
    return cost
