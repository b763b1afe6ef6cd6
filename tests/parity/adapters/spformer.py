import torch

from polypatch.patching import spformer
from polypatch.patching.spformer_weights import assemble_official


def run(case):
    if "in_channels_pixel" in case.config:
        return _layer(case)
    model = spformer.from_official(case.config, case.state)
    image = case.inputs["image"] if "image" in case.inputs else next(iter(case.inputs.values()))
    tokens = model.forward_features(image)
    outputs = {"logits": model(image), "": model(image), "tokens": tokens.x}
    if model.seg_head is not None:
        wanted = case.outputs.get("pixel_logits")
        stride = image.shape[-2] // wanted.shape[-2] if wanted is not None else None
        logits = model.segment(image, stride=stride)
        outputs |= {"sp_logits": logits.superpixels, "pixel_logits": logits.pixels}
    wanted = case.outputs.get("hard_map")
    stride = image.shape[-2] // wanted.shape[-2] if wanted is not None else None
    outputs["hard_map"] = model.hard_maps(image, stride=stride)[-1]
    return outputs


def _layer(case):
    layer = spformer.layer_from_official(case.config, case.state)
    pixels, superpixels = case.inputs["pixel"], case.inputs["superpixel"]
    cell = (
        pixels.shape[2] // superpixels.shape[2],
        pixels.shape[3] // superpixels.shape[3],
    )
    refined = layer(pixels.permute(0, 2, 3, 1), superpixels.permute(0, 2, 3, 1))

    def as_map(logits):  # (b, rows, columns, heads, cell, 9) -> (b, heads, 9, height, width)
        whole = spformer.from_cells(logits, cell).unflatten(-1, (logits.shape[3], 9))
        return whole.permute(0, 3, 4, 1, 2)

    weights = spformer.update_weights(refined.similarities).unflatten(-1, cell)
    outputs = {
        "superpixel": refined.superpixels.permute(0, 3, 1, 2),
        "similarities_sp": as_map(refined.similarities),
        "update_weights": weights.permute(0, 3, 4, 5, 6, 1, 2),
    }
    if refined.pixel_similarities is not None:
        outputs |= {
            "pixel": refined.pixels.permute(0, 3, 1, 2),
            "similarities_pixel": as_map(refined.pixel_similarities),
            "assign_weights": as_map(spformer.assign_weights(refined.pixel_similarities)),
        }
    return outputs


def count(name, config):
    with torch.device("meta"):
        model = assemble_official(config)
    return sum(p.numel() for p in model.parameters())
