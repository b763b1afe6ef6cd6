import torch

from polypatch.hosts.layouts import from_official
from polypatch.hosts.vit import assemble_vit


def run(case):
    model = from_official(case.config, case.state)
    features = model.forward_features(case.inputs["x"])
    pooled = model.pooling(features)
    return {
        "tokens": features.x,
        "last_hidden_state": features.x,
        "pooler_output": pooled,
        "logits": model.head(pooled),
    }


#: timm's named models, in the library's terms (timm counts DINOv2, SigLIP and huge without a head).
NAMED = {
    "vit_tiny_patch16_224": dict(dim=192, depth=12, heads=3, hidden=768),
    "deit_tiny_patch16_224": dict(dim=192, depth=12, heads=3, hidden=768),
    "vit_small_patch16_224": dict(dim=384, depth=12, heads=6, hidden=1536),
    "vit_base_patch16_224": dict(dim=768, depth=12, heads=12, hidden=3072),
    "vit_large_patch16_224": dict(dim=1024, depth=24, heads=16, hidden=4096),
    "vit_huge_patch14_224": dict(
        dim=1280, depth=32, heads=16, hidden=5120, patch=14, grid=(16, 16), classes=0
    ),
    "vit_small_patch14_dinov2": dict(
        dim=384, depth=12, heads=6, hidden=1536, patch=14, grid=(37, 37), classes=0, layer_scale=1.0
    ),
    "vit_base_patch14_reg4_dinov2": dict(
        dim=768, depth=12, heads=12, hidden=3072, patch=14, grid=(37, 37), classes=0,
        layer_scale=1.0, prefix=5, positioned=0,
    ),
    "vit_giant_patch14_dinov2": dict(
        dim=1536, depth=40, heads=24, hidden=4096, patch=14, grid=(37, 37), classes=0,
        layer_scale=1.0, gated=True,
    ),
    "vit_base_patch16_clip_224": dict(
        dim=768, depth=12, heads=12, hidden=3072, norm_in=True, patch_bias=False
    ),
    "vit_base_patch16_siglip_224": dict(
        dim=768, depth=12, heads=12, hidden=3072, pooling="attention", prefix=0, positioned=0,
        classes=0,
    ),
    "vit_so400m_patch14_siglip_224": dict(
        dim=1152, depth=27, heads=16, hidden=4304, patch=14, grid=(16, 16), pooling="attention",
        prefix=0, positioned=0, classes=0,
    ),
    "flexivit_small": dict(
        dim=384, depth=12, heads=6, hidden=1536, grid=(15, 15), positioned=0
    ),
}  # fmt: skip


def count(name, config):
    usual = dict(patch=16, grid=(14, 14), classes=1000, prefix=1, positioned=1)
    with torch.device("meta"):
        model = assemble_vit(**(usual | NAMED[name]))
    return sum(p.numel() for p in model.parameters())
