import torch

from polypatch.patching.spt_lsa import build, from_official


def run(case):
    model = from_official(case.config, case.state)
    return {"": model(*case.inputs.values())}


def count(name, config):
    """Of a named variant such as ``pit_64px_SPT_LSA``."""
    with torch.device("meta"):
        model = build(
            f"spt-lsa-{name.split('_')[0]}",
            classes=config["num_classes"],
            resolution=config["img_size"],
            spt=config["is_SPT"],
            lsa=config["is_LSA"],
        )
    return sum(p.numel() for p in model.parameters())
