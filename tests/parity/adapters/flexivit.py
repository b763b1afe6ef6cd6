import math
import re

import torch

from polypatch.patching.flexivit import (
    FlexiPatching,
    assemble,
    from_official,
    resample_patch_embed,
    resample_positions,
)


def run(case):
    return network(case) if "image" in case.inputs else functions(case)


def functions(case):
    out = {}
    for name in case.outputs:
        if match := re.fullmatch(r"(.*kernel.*)_(\d+)x(\d+)", name):
            size = (int(match[2]), int(match[3]))
            layout = case.config.get("kernel_layout", "HWIO")
            out[name] = resample_patch_embed(case.inputs[match[1]], size, layout=layout)
        elif match := re.fullmatch(r"(model_)?(posemb_\d+_to_(\d+))", name):
            table = case.inputs[match[2]]
            old, new = math.isqrt(table.shape[1]), int(match[3])
            grid = table.unflatten(1, (old, old))
            method = "linear" if match[1] else "zoom"
            small = resample_positions(grid, (new, new), method=method)
            out[name] = small if match[1] else small.flatten(1, 2)
    return out


def network(case):
    model = from_official(case.config, case.state)
    assert isinstance(model.patching, FlexiPatching)
    image = case.inputs["image"].permute(0, 3, 1, 2)
    out = {}
    for name in case.outputs:
        kind, match = name, re.fullmatch(r"(\w+)_seqhw(\d+)", name)
        if match:
            kind = match[1]
            model.patching.seqhw = int(match[2])
        stem = model.patching(image)
        if kind == "stem":
            out[name] = stem.x.unflatten(1, stem.grid)
        elif kind == "with_posemb":
            out[name] = model.position(stem).x
        else:
            out[name] = model(image)
    return out


def count(name, config):
    with torch.device("meta"):
        model = assemble(config)
    return sum(p.numel() for p in model.parameters())
