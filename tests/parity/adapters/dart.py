"""DART's cases: a whole DARViT, with what its tokenizer gives on the way."""

import ast

import torch
from torch import nn

from polypatch.patching import dart
from polypatch.patching.dart_networks import assemble

MODULES = {"Conv2d", "AvgPool2d", "MaxPool2d", "BatchNorm2d", "ReLU", "GELU", "SiLU", "Identity"}


def features_of(text):
    """A module from a description such as ``Conv2d(3,12,kernel_size=8,stride=8)``; None where the
    weights tell what it is."""
    text = text.removeprefix("nn.")
    if not text.startswith((*MODULES, "Sequential(")) or text.startswith("Identity"):
        return None

    def made(node):
        assert isinstance(node, ast.Call)
        name = ast.unparse(node.func).split(".")[-1]
        if name == "Sequential":
            return nn.Sequential(*[made(argument) for argument in node.args])
        assert name in MODULES, name
        options = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
        return getattr(nn, name)(*[ast.literal_eval(a) for a in node.args], **options)

    return made(ast.parse(text, mode="eval").body)


def arguments(config):
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    spn = config.pop("spn", None)
    if isinstance(spn, dict):
        given = {"version": spn["version"]} if "version" in spn else {}
        features = features_of(str(spn.get("features", "")))
        if features is not None:
            given["features"] = features
        config["spn"] = given
    return config


def run(case):
    model = dart.from_official(arguments(case.config), case.state)
    image = next(iter(case.inputs.values()))
    patching = model.patching
    height, width = image.shape[-2:]
    grid = (-(-height // patching.cell), -(-width // patching.cell))
    score = patching.score(image, grid)
    partition = patching.cut(image)
    tokens = patching(image)
    logits = model(image)
    return {
        "": logits,
        "logits": logits,
        "features": model.pooling(model.forward_features(image)),
        "tokenizer.x": tokens.x,
        "tokenizer.score": score.flatten(1),
        "tokenizer.pdf": patching.density(image).flatten(1),
        # Their row heights are those of an image with 16 pixels per cell.
        "tokenizer.row_heights": partition.rows.diff(dim=1) * 16,
        "tokenizer.reshaped_pdf": partition.density,
        "tokenizer.pos": model.position(tokens.with_x(torch.zeros_like(tokens.x))).x,
        "tokenizer.new_edges": partition.strip * patching.cell,
    }


SCORES = {"MobileNetSmallPred": "mobilenet-small", "MobileNetLargePred": "mobilenet-large",
          "EfficientNetB0Pred": "efficientnet-b0"}  # fmt: skip


def score_network(text):
    name = next(ours for theirs, ours in SCORES.items() if theirs in text)
    version = "v2" if "v2" in text else "v1"
    features = dart.score_features(name, version)
    return dart.ScoreNetwork(
        features=features.make(3), feature_dim=features.dim, hidden=features.hidden,
        version=version, frozen=True, last_bias=True,
    )  # fmt: skip


def network(name, config):
    if "embed_dim" not in config:
        return score_network(name)
    cells = config["img_size"] // (32 if config["high_res"] else 16)
    return assemble(
        dim=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        hidden=int(config["embed_dim"] * config["mlp_ratio"]),
        qkv_bias=config["qkv_bias"],
        classes=config.get("num_classes", 1000),
        grid=(cells, cells),
        cell=32 if config["high_res"] else 16,
        tokens=config["num_patches"],
        rows=config["target_h"],
        score=score_network(config["spn"]),
    )


def count(name, config):
    with torch.device("meta"):
        return sum(p.numel() for p in network(name, config).parameters())
