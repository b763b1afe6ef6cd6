"""Our plain ViT against transformers' with the same weights: forward and training step.

OMP_WAIT_POLICY=passive python benchmarks/vit.py [tiny|small] [threads]
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from pairs import paired  # first: it sets OMP_WAIT_POLICY
from transformers import ViTConfig, ViTForImageClassification

from polypatch.hosts.layouts import from_official
from polypatch.hosts.vit import SIZES
from polypatch.training.cost import count_flops, latency


def step(model: torch.nn.Module, image: torch.Tensor, label: torch.Tensor) -> None:
    model.zero_grad()
    out = model(image)
    torch.nn.functional.cross_entropy(getattr(out, "logits", out), label).backward()


def matmul_gflops() -> float:
    """What a large matrix product reaches on as many threads, in GFLOP/s."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048**3 / latency(lambda: a @ b, seconds=1.0) / 1e9


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    if len(sys.argv) > 2:
        torch.set_num_threads(int(sys.argv[2]))
    size = SIZES[name]
    config = ViTConfig(
        hidden_size=size.dim,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        intermediate_size=size.hidden,
        num_labels=1000,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    theirs = ViTForImageClassification(config).eval()
    ours = from_official(
        {"class": "ViTForImageClassification", "num_attention_heads": size.heads},
        theirs.state_dict(),
    )
    image = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        difference = (ours(image) - theirs(image).logits).abs().max().item()
    print(f"vit-{name}, {torch.get_num_threads()} threads, largest difference {difference:.1e}")
    print(f"a 2048 × 2048 matrix product: {matmul_gflops():.0f} GFLOP/s")
    for batch in (1, 32):
        image = torch.randn(batch, 3, 224, 224)
        with torch.inference_mode():
            pair = paired(
                partial(ours, image), partial(theirs, image), rounds=25 if batch == 1 else 9
            )
        reached = count_flops(ours, image) / (pair.ours / 1e3) / 1e9
        print(f"forward, batch {batch:2d}:        {pair}   {reached:.0f} GFLOP/s")
    for batch in (1, 32):
        image, label = torch.randn(batch, 3, 224, 224), torch.zeros(batch, dtype=torch.long)

        ours.train()
        theirs.train()
        pair = paired(
            partial(step, ours, image, label),
            partial(step, theirs, image, label),
            rounds=15 if batch == 1 else 5,
        )
        print(f"training step, batch {batch:2d}:  {pair}")


if __name__ == "__main__":
    main()
