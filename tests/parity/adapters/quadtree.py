import torch
from torch import nn

from polypatch.patching.quadtree import (
    QuadtreePatching,
    entropy_maps,
    flat_layout,
    group_patches,
    laplacian_maps,
    reconstruction_maps,
    select_patches,
)


def run(case):
    if "image_u8" in case.inputs:
        return maps(case)
    return tokenizer(case)


def maps(case):
    config, pixels = case.config, case.inputs["image_u8"].float()
    patch = config["patch_size"]
    sides = [patch * 2**i for i in range(config["num_scales"])]
    bins, incomplete = config.get("bins", 512), config.get("pad_value", 1e6)
    entropy = entropy_maps(pixels, sides, bins=bins, incomplete=incomplete)
    single = entropy_maps(pixels[:1], sides, bins=bins, span=255.0, incomplete=incomplete)
    error = reconstruction_maps(pixels, sides, factors=config["mse_scale_factors"])
    out = {f"entropy.{side}": m for side, m in entropy.items()}
    out |= {f"entropy_first_image_histc.{side}": m[0] for side, m in single.items()}
    out |= {f"mse.{side}": m for side, m in error.items()}
    for aggregate in ("mean", "max", "std"):
        response = laplacian_maps(pixels, sides, aggregate=aggregate)
        out |= {f"laplacian_{aggregate}.{side}": m for side, m in response.items()}
    grid = (entropy[patch].shape[1], entropy[patch].shape[2])
    for name, thresholds in config["thresholds"].items():
        masks = select_patches(entropy, thresholds, patch=patch, grid=grid)
        out |= {f"masks_{name}.{side}": mask.float() for side, mask in masks.items()}
    return out


def tokenizer(case):
    config, images = case.config, case.inputs["images"]
    patch, scales = config["base_patch_size"], config["num_scales"]
    patching = QuadtreePatching(
        proj=nn.Conv2d(images.shape[1], 4, patch, patch),
        patch=patch,
        thresholds=config["thresholds"],
        method=config["method"],
        aggregate=config["laplacian_aggregate"],
        mean=config["mean"],
        std=config["std"],
    )
    assert len(patching.sides) == scales
    masks = patching.masks(images)
    groups = group_patches(images, masks, patch=patch)
    scale, lengths = flat_layout(masks)
    importance = patching.importance_maps(images, base=True)
    out = {f"resized_patches_{side}": p for side, p in groups.resized.items()}
    out |= {f"full_patches_{side}": p for side, p in groups.constituents.items()}
    out |= {f"pos_embed_mask_{side}": m.flatten(1) for side, m in masks.items()}
    out |= {f"importance_maps.{side}": m for side, m in importance.items()}
    cells = images.shape[0] * images.shape[-1] * images.shape[-2] / patch**2
    return out | {
        "output_mask": scale.float(),
        "seqlens": lengths,
        "cu_seqlens": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        "max_seqlen": lengths.max(),
        "retained_frac": lengths.sum() / cells,
    }


def count(name, config):
    """The tokenizer itself, which is what the authors' configuration names, has no parameters."""
    return 0
