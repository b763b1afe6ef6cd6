import torch

from polypatch.backbones import vikanformer as v
from polypatch.backbones import vikanformer_expansions as e
from polypatch.nn import KeyMap

#: their class → our kind, and the constructor's words
LAYERS = {
    "KANLinear": "efficientkan",
    "FastKANLayer": "fast",
    "SineKANLayer": "sine",
    "NaiveFourierKANLayer": "fourier",
    "ChebyKANLayer": "cheby",
}


def run(case):
    if "cls" in case.config:
        return _layer(case)
    model = v.from_official(case.config, case.state)
    logits = model(next(iter(case.inputs.values())))
    return {"": logits, "logits": logits, "presoftmax": logits, "probabilities": logits.softmax(1)}


def _options(config):
    words = {
        "grid_size": "grid", "gridsize": "grid", "num_grids": "grid", "spline_order": "order",
        "degree": "degree", "scale_noise": "noise", "enable_standalone_scale_spline": "scaled",
        "use_base_update": "base", "is_first": "first", "norm_freq": "normed",
        "add_bias": "bias", "addbias": "bias", "smootorch_initialization": "smooth",
        "grid_min": "low", "grid_max": "high", "spline_weight_init_scale": "std",
    }  # fmt: skip
    options = {words[name]: value for name, value in config.items() if name in words}
    if "grid_range" in config:
        options["low"], options["high"] = config["grid_range"]
    return options


def _layer(case):
    config = case.config
    kind = LAYERS[config["cls"]]
    inputs = next(config[n] for n in ("in_features", "input_dim", "inputdim") if n in config)
    outputs = next(config[n] for n in ("out_features", "output_dim", "outdim") if n in config)
    layer = v.make_expansion(kind, inputs=inputs, outputs=outputs, options=_options(config))
    rules = v.layer_rules(kind, ("layer",), "expansion")
    keys = KeyMap(rules, unused=["layer.arange"])
    state = {f"layer.{name}": value for name, value in case.state.items()}
    single = e.Single(layer)
    keys.load(single, state, what="this layer")
    out = {"y": single(case.inputs["x"])}
    if kind == "efficientkan":
        knots, order = layer.grid, layer.order
        inner = knots[0, order : order + layer.intervals + 1]
        points = inner[:, None].expand(-1, inputs)
        if "basis_x" in case.inputs:
            out["bases"] = e.bspline_basis(case.inputs["basis_x"], knots, order)
        if "fit_x" in case.inputs:
            fit = e.fit_spline(case.inputs["fit_x"], case.inputs["fit_y"], knots, order)
            out["fit_coeff"] = fit
        if "noise" in case.inputs:
            out["init_coeff"] = e.fit_spline(points, case.inputs["noise"], knots, order)
    if "rbf_x" in case.inputs:
        out["rbf"] = layer.basis(case.inputs["rbf_x"][:, None])[:, 0]
    return out


def count(name, config):
    state = name.rpartition("@ ")[2] if "@" in name else ""
    with torch.device("meta"):
        model = v.network({"code_state": state, **config})
    parameters = dict(model.named_parameters())
    if config["type"] == "fourier" and state.startswith("29bc487"):
        # Their network of that state has no patch map at all, and fails when it is called.
        parameters = {n: p for n, p in parameters.items() if not n.startswith("patch_map")}
    return sum(p.numel() for p in parameters.values())
