from polypatch.patching.patch_scaling import from_official, resize_positions


def run(case):
    config = case.config
    if "old_grid" in config:  # the script's resizing of positions
        table = resize_positions(
            case.inputs["pos_embed"],
            (config["old_grid"],) * 2,
            (config["new_grid"],) * 2,
            extra=config["num_extra_tokens"],
            leading=True,
        )
        return {"": table}
    model = from_official(config, case.state)
    (image,) = case.inputs.values()
    pooled = model.pooled(image)
    logits = model.head(pooled)
    return {"": logits, "logits": logits, "features": pooled}
