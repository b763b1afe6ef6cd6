"""ElasticViT: patches may move, shrink and go missing (Pardyl et al., WACV 2025, arXiv 2309.13353).

**The claim**, in the abstract: a position code of both corners of a patch's box, together with
training on random crops and PatchMix, makes a ViT more elastic, that is less dependent on the fixed
grid of patches. The paper has a protocol for it: change the scale and the place of patches, leave
some out, and see how much accuracy stays.

**Why it can be tested here.** The protocol compares accuracies of one network with each other. Each
network is tested on the grid and with patches that are smaller (zoom), displaced (shake), missing
(dropout) or merged by four into one of twice the side, at several strengths each
(:data:`polypatch.patching.elastic_sampling.PERTURBATIONS`). Elasticity is the area under the curve
of accuracy against strength, as a share of that of a network that would keep its accuracy on the
grid, averaged over the four; the paper's own formula could not be found. A network that only
guesses keeps its accuracy perfectly. So accuracies are taken above chance (1 / classes), and the
table has them as they are.

The baseline is the same ViT with its learned positions (read at a patch's centre), trained on the
grid. A third arm, with the new position code but trained on the grid, shows which of the two parts
does it.

**What can't be tested**: that accuracy on the grid stays competitive; at equal, short training the
harder task costs accuracy (see the table), which 800 epochs may give back. Neither are the adaptive
samplers (EDGE, CENTRAL) judged.
"""

from __future__ import annotations

from ..patching.elastic_sampling import accuracy_curve, elasticity
from .base import Claim, Evidence, Lab
from .evaluation import batches, differences, spread

RESOLUTION = 32
PLAIN = "vit-nano(patch=8)+elastic-vit(patchmix=0,position=host,train=grid)"
CODED = "vit-nano(patch=8)+elastic-vit(patchmix=0,train=grid)"
ELASTIC = "vit-nano(patch=8)+elastic-vit"
STEPS = 400
#: In pixels of a patch of 8 (zoom, shake), patches out of 16, blocks out of 4.
STRENGTHS: dict[str, tuple[int, ...]] = {
    "zoom": (0, 2, 4, 6),
    "shake": (0, 2, 4),
    "dropout": (0, 4, 8, 12),
    "merge": (0, 2, 4),
}


def experiment(lab: Lab) -> Evidence:
    runs = lab.train((PLAIN, CODED, ELASTIC), resolution=RESOLUTION, budget=f"{STEPS}steps")
    data = lab.data(runs[PLAIN][0])
    test, chance = batches(data), 1 / len(data.classes)
    # Per arm and perturbation: the curve of each seed.
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for spec, made in runs.items():
        models = [lab.host(run) for run in made]
        curves[spec] = {
            kind: [accuracy_curve(m, test, kind=kind, strengths=strengths) for m in models]
            for kind, strengths in STRENGTHS.items()
        }
    kept = {
        spec: {
            kind: [
                elasticity(STRENGTHS[kind], [max(0.0, a - chance) for a in curve])
                for curve in curves[spec][kind]
            ]
            for kind in STRENGTHS
        }
        for spec in runs
    }
    scores = {
        spec: [100 * sum(at) / len(at) for at in zip(*kept[spec].values(), strict=True)]
        for spec in runs
    }
    columns = {kind: f"{kind} {STRENGTHS[kind][-1]}" for kind in STRENGTHS}
    return Evidence(
        values=differences(scores[ELASTIC], scores[PLAIN]),
        table={
            spec: {
                "grid": spread([100 * curve[0] for curve in curves[spec]["zoom"]]),
                **{
                    columns[kind]: spread([100 * curve[-1] for curve in curves[spec][kind]])
                    for kind in STRENGTHS
                },
                "elasticity": spread(scores[spec], " %"),
            }
            for spec in runs
        },
        remark="Test accuracy in per cent on the grid and at the largest strength of each "
        f"perturbation; {STEPS} steps each on crops of {RESOLUTION} pixels of `bundled:photos`, "
        "16 tokens.",
    )


CLAIM = Claim(
    slug="elastic-vit",
    says="A position code of both corners of a patch, random crops and PatchMix make a ViT less "
    "dependent on the grid: more accuracy stays where patches shrink, move or are missing "
    "(abstract).",
    metric="elasticity (accuracy above chance that stays, averaged over strengths of zoom, shake, "
    "dropout and merging), ElasticViT minus a ViT trained on the grid, in percentage points",
    margin=0.0,
    experiment=experiment,
)
