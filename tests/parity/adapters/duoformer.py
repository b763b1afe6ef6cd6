import torch

from polypatch.backbones import duoformer


def run(case):
    if case.config["class"] == "MultiscaleFormer":
        encoder, head = duoformer.encoder_from_official(case.config, case.state)
        logits = head(encoder(next(iter(case.inputs.values()))))
        return {"": logits, "logits": logits}
    model = duoformer.from_official(case.config, case.state)
    (image,) = case.inputs.values()
    if image.dtype == torch.uint8:
        image = image.float() / 255 - 0.5
    logits = model(image)
    outputs = {"": logits, "logits": logits}
    if "window_tokens" in case.outputs:
        wanted = case.outputs["window_tokens"]
        tokens = model.window_tokens(image)
        step = -(-tokens.shape[1] // wanted.shape[1])  # a selection of windows and channels is kept
        outputs["window_tokens"] = tokens[:, ::step, :, : wanted.shape[3]]
    return outputs


def count(name, config):
    with torch.device("meta"):
        return sum(p.numel() for p in duoformer.network(config).parameters())
