"""BOAT: clusters of features hold the similar patches that windows of the image miss (Yu et al.,
BMVC 2022, arXiv 2201.13027).

**The claim**, in the abstract: window attention "fails to capture the relationships between distant
but similar patches"; attention within clusters of features "effectively captures the connections
between patches across different local windows but still relevant".

**Why it can be tested here.** It is a statement about what tokens meet, apart from accuracy, and
could well fail: images are smooth, so that a window holds much that is similar, while the clusters
are cut greedily, two rounds a cut, and must be equally large. In the first block of a trained
network each token has its nearest neighbours, as many as share a cluster with it, by the cosine of
what enters FSLA, all channels together. The share of them in the token's cluster (of the queries of
one head) is compared with the share in its window of the map, which is as large: 16 tokens of 256.
Chance is 6 %. The overlap of clusters is not counted. Nothing trains the network for this.

**What can't be tested**: the gain in accuracy on ImageNet, COCO and ADE20K, of about a point over
Swin and CSWin.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ..backbones.boat import BoatCSWin
from ..backbones.boat_attention import Bilateral
from ..compare import trained
from .base import Claim, Evidence, Lab
from .evaluation import batches, differences, spread

RESOLUTION = 64
SPEC = "boat-nano"
STEPS = 120
WINDOW = 4


def recall(
    similarity: Float[Tensor, "batch tokens tokens"],
    together: Bool[Tensor, "batch #heads tokens tokens"],
) -> float:
    """Share of each token's nearest neighbours that are ``together`` with it, in per cent; as many
    neighbours as it is together with."""
    tokens = similarity.shape[-1]
    mates = int(together[0, 0, 0].sum()) - 1
    apart = similarity.masked_fill(torch.eye(tokens, dtype=torch.bool), -torch.inf)
    nearest = apart.topk(mates, -1).indices[:, None].expand(-1, together.shape[1], -1, -1)
    return 100 * float(together.gather(-1, nearest).float().mean())


@torch.no_grad()
def shares(model: BoatCSWin, images: Tensor) -> tuple[float, float]:
    """Recall of clusters and of windows in the first block."""
    block = model.stages[0][0]  # type: ignore[index]
    assert isinstance(block, Bilateral)
    x = block.norm(block.block.mix(model.stem(images.permute(0, 2, 3, 1))))
    batch, height, width, _ = x.shape
    tokens = height * width
    order = block.feature.clusters(block.feature.qkv(x)).view(batch, -1, tokens)
    number = torch.arange(tokens) // block.feature.cluster
    cluster = torch.empty_like(order).scatter_(-1, order, number.expand_as(order))
    rows, columns = torch.arange(height) // WINDOW, torch.arange(width) // WINDOW
    window = (rows[:, None] * width + columns).flatten().expand(batch, 1, -1)
    unit = F.normalize(x.flatten(1, 2), dim=-1)
    similarity = unit @ unit.mT
    return (
        recall(similarity, cluster[..., None] == cluster[..., None, :]),
        recall(similarity, window[..., None] == window[..., None, :]),
    )


def experiment(lab: Lab) -> Evidence:
    runs = lab.train((SPEC,), resolution=RESOLUTION, budget=f"{STEPS}steps")[SPEC]
    images = batches(lab.data(runs[0]), size=64)[0][0]
    found = []
    for run in runs:
        model = trained(run)
        assert isinstance(model, BoatCSWin)
        found.append(shares(model, images))
    clusters, windows = zip(*found)
    return Evidence(
        values=differences(clusters, windows),
        table={
            "clusters of features": {"nearest neighbours": spread(clusters, " %")},
            "windows of the image": {"nearest neighbours": spread(windows, " %")},
        },
        remark=f"{STEPS} steps on crops of {RESOLUTION} pixels of `bundled:photos`; 64 test crops, "
        f"all heads. Accuracy: {spread(lab.accuracy(runs), ' %')}.",
    )


CLAIM = Claim(
    slug="boat",
    says="Attention within clusters of features captures similar patches that windows of the image "
    "miss (abstract).",
    metric="share of a patch's nearest neighbours in feature space that are in its cluster minus "
    "share in its window of the same size, in percentage points",
    margin=0.0,
    experiment=experiment,
)
