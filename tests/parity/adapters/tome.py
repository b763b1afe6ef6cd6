import torch

from polypatch.hosts import build_vit
from polypatch.hosts.layouts import from_official
from polypatch.hosts.vit import assemble_vit
from polypatch.reducing.tome import (
    bipartite_soft_matching,
    kth_bipartite_soft_matching,
    merge_source,
    merge_wavg,
    parse_r,
    plug,
)


def run(case):
    return functions(case) if "x" not in case.inputs else host(case)


def functions(case):
    out = {}
    for name, config in case.config.items():
        if name == "parse_r":
            for number, (layers, r) in enumerate(config):
                if isinstance(r, dict):
                    r = r["list"]
                elif isinstance(r, list):
                    r = tuple(r)
                out[f"parse_r.{number}"] = torch.tensor(parse_r(layers, r))
            continue
        metric, x = case.inputs[f"{name}.metric"], case.inputs[f"{name}.x"]
        if config["function"] == "kth_bipartite_soft_matching":
            matching = kth_bipartite_soft_matching(metric, config["k"])
        else:
            protected = int(config["class_token"]) + int(config["distill_token"])
            matching = bipartite_soft_matching(metric, config["r"], protected=protected)
            out[f"{name}.source"] = merge_source(matching)
        for mode in ("mean", "sum", "amax", "amin", "prod"):
            out[f"{name}.{mode}"] = matching.merge(x, mode)
        out[f"{name}.unmerged"] = matching.unmerge(matching.merge(x, "mean"))
        out[f"{name}.wavg_unit"] = merge_wavg(matching, x)[0]
        if f"{name}.size" in case.inputs:
            size = case.inputs[f"{name}.size"]
            out[f"{name}.wavg"], out[f"{name}.wavg_size"] = merge_wavg(matching, x, size)
    return out


def host(case):
    config, image = case.config, case.inputs["x"]
    model = from_official(config["host"], case.state)
    plain = model(image)
    r = config["r"]
    if isinstance(r, list) and any(isinstance(value, float) for value in r):
        r = tuple(r)
    plug(model, r=r, proportional=config["prop_attn"])
    tokens = model.forward_features(image)
    count, start = tokens.x.shape[1], tokens.prefix
    cells = model.tokens(image).x.shape[1] - start
    if tokens.regions is None:  # nothing was merged
        owner, size = torch.arange(cells).expand(len(image), -1), torch.ones(len(image), count)
    else:
        owner, size = tokens.regions.owner, tokens.weight
    owner = torch.cat([torch.arange(start).expand(len(owner), -1), owner + start], dim=1)
    source = torch.zeros(len(owner), count, owner.shape[1])
    source.scatter_(1, owner[:, None], 1.0)
    return {
        "logits": model.head(model.pooling(tokens)),
        "tokens": tokens.x,
        "size": size[..., None],
        "source": source,
        "host_logits": plain,
    }


def count(name, config):
    name = config["host"]
    size = name.split("_")[1]
    with torch.device("meta"):
        if "distilled" in name:
            widths = {"tiny": (192, 3, 768), "small": (384, 6, 1536), "base": (768, 12, 3072)}
            dim, heads, hidden = widths[size]
            model = assemble_vit(
                dim=dim, depth=12, heads=heads, hidden=hidden, patch=16, grid=(14, 14),
                classes=1000, pooling="class+distill", prefix=2, positioned=2,
            )  # fmt: skip
        else:
            model = build_vit(size)
        plug(model)
    return sum(p.numel() for p in model.parameters())
