from dataclasses import replace

import numpy as np
import torch

from polypatch.patching import elastic_sampling as sampling
from polypatch.patching import elastic_vit


def run(case):
    config, inputs = case.config, case.inputs
    if "embed_dim" in config and "x" not in inputs:
        return {
            "scale_aware": elastic_vit.position_code(inputs["coords"], config["embed_dim"]),
            "two_d": elastic_vit.position_code(
                inputs["coords"], config["embed_dim"], scale_aware=False
            ),
        }
    if "embed_dim" in config:
        return {"": network(case)}
    if "smart_patches" in config:
        return edge(config, inputs)
    if "patch_modifications" in config:
        return grids(config, inputs["image"])
    return others(config, inputs["image"], case.outputs)


def network(case):
    host = elastic_vit.from_official(case.config, case.state)
    x, boxes, keeps = case.inputs["x"], case.inputs["coords"], case.inputs.get("keeps")
    image = case.config["img_size"]
    canvas = (image, image) if isinstance(image, int) else tuple(image)
    if x.ndim == 4:
        boxes = boxes.float()
        tokens = replace(
            host.patching(x),
            centre=(boxes[..., :2] + boxes[..., 2:]) / 2,
            extent=boxes[..., 2:] - boxes[..., :2],
        )
    else:
        tokens = host.patching.embed(x, boxes, canvas=canvas)
    return elastic_vit.classify(host, tokens, keeps=keeps)


def cut(image, boxes, size=16):
    return sampling.crop(image[None], boxes, size)[0]


def grids(config, image):
    names = {
        "patch_zoom": "zoom",
        "patch_shake": "shake",
        "patch_dropout": "dropout",
        "patch_dropout_blocks": "dropout_block",
        "patch_select": "select",
        "patch_select_mode": "select_mode",
    }
    outputs = {}
    for name, options in config["patch_modifications"].items():
        sampler = sampling.GridSampler(
            patch=config["patch_size"][0],
            hard=config.get("hard_dropout", True),
            **{names[key]: value for key, value in options.items()},
        )
        rng = np.random.RandomState(config["numpy_global_seed_before_each"])
        drawn = sampler(tuple(image.shape[1:]), 1, rng, image[None])
        patches = cut(image, drawn.boxes)
        if drawn.blank is not None:
            patches = patches.masked_fill(drawn.blank[0][:, None, None, None], 0.0)
        outputs |= {f"{name}.patches": patches, f"{name}.coords": drawn.boxes[0]}
    return outputs


def edge(config, inputs):
    image = inputs.get("image")
    if image is None:
        image = inputs["image_uint8"].float() / 255
    drawn = sampling.EdgeSampler(
        count=config["smart_patches"],
        smallest=config.get("min_patch_size", 8),
        largest=config.get("max_patch_size", 48),
        sigma=config.get("canny_sigma", 12),
        border=config.get("border", 7),
    )(tuple(image.shape[1:]), 1, np.random.default_rng(0), image[None])
    return {"coords": drawn.boxes[0], "patches": cut(image, drawn.boxes)}


def others(config, image, wanted):
    canvas, outputs = tuple(image.shape[1:]), {}

    def add(name, boxes):
        outputs[f"{name}.coords"] = boxes[0]
        patches = cut(image, boxes)
        # Some cases hold the first patches only.
        outputs[f"{name}.patches"] = patches[: len(wanted.get(f"{name}.patches", patches))]

    if "GridSamplerV2" in config:
        # Their pair is called (y, x) and read as (x, y).
        across, down = config["GridSamplerV2"]["patches_num_yx"]
        boxes = sampling.grid_spans(canvas, across=across, down=down)
        size = tuple(config["GridSamplerV2"]["patch_size"])
        outputs["gridv2.coords"] = boxes
        outputs["gridv2.patches"] = sampling.crop_spans(image[None], boxes[None], size)[0]
    if "CentralMultiscaleSampler" in config:
        sampler = sampling.CentralSampler(sizes=config["CentralMultiscaleSampler"]["patch_sizes"])
        add("central", sampler(canvas, 1, np.random.default_rng(0)).boxes)
    if "RandomUniformSampler" in config:
        options = config["RandomUniformSampler"]
        sampler = sampling.RandomSampler(
            count=options["random_patches"],
            smallest=options.get("min_patch_size", 8),
            largest=options.get("max_patch_size", 48),
        )
        add("random", sampler(canvas, 1, np.random.default_rng(options["seed"])).boxes)
    if "RandomMultiscaleSampler" in config:
        options = config["RandomMultiscaleSampler"]
        sampler = sampling.MultiscaleSampler(sizes=tuple(options["crop_sizes"]))
        add("multiscale", sampler(canvas, 1, np.random.default_rng(options["seed"])).boxes)
    return outputs


def count(name, config):
    with torch.device("meta"):
        host = elastic_vit.assemble_official(config)
    return sum(p.numel() for p in host.parameters())
