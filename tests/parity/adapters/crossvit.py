from polypatch.backbones.crossvit import from_official


def run(case):
    model = from_official(case.config, case.state)
    (image,) = case.inputs.values()
    pooled = model.pooled(image)
    logits = model.head(pooled)
    outputs = {"": logits, "logits": logits, "features": pooled}
    # the authors' forward_features gives the class token of each branch
    for number, token in enumerate(pooled.split(model.dims, dim=1)):
        outputs[f"features.{number}"] = token
    return outputs
