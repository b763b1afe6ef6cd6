import torch

from polypatch.backbones.boat import from_official
from polypatch.backbones.boat_attention import FeatureAttention
from polypatch.nn import KeyMap

from ..test_parity import backbone_run

#: FSLA alone
NAMES = KeyMap([("qkv", "qkv"), ("proj", "proj"), ("get_v", "lepe")])


def run(case):
    inputs = next(iter(case.inputs.values()))
    if "depth" in case.config or "depths" in case.config:
        model = from_official(case.config, case.state)
        return backbone_run(model, inputs, set(case.outputs))
    return feature_attention(case.config, case.state, inputs)


def feature_attention(config, state, x):
    """Of tokens (batch, tokens, dim) of a square map."""
    batch, tokens, dim = x.shape
    model = FeatureAttention(
        dim=dim,
        heads=config["num_heads"],
        bias=config.get("qkv_bias", True),
        scale=config.get("effective_scale", config.get("qk_scale")),
        pair_across_batch="CSWin" in config.get("cls", ""),
    )
    NAMES.load(model, state, what="FSLA")
    side = int(tokens**0.5)
    x = x.view(batch, side, side, dim)
    qkv = model.qkv(x)
    order = model.clusters(qkv).view(batch, model.heads, tokens)
    q = qkv[..., :dim].view(batch, tokens, model.heads, -1).transpose(1, 2)
    return {
        "": model(x).view(batch, tokens, dim),
        "y": model(x).view(batch, tokens, dim),
        "q": q,
        "order": order,
        "inverse": torch.argsort(order, -1),
    }
