import torch

from polypatch.backbones.three_things import from_official, keymap, network, train_only


def run(case):
    return flags(case) if not case.inputs else outputs(case)


def outputs(case):
    model = from_official(case.config, case.state)
    (image,) = case.inputs.values()
    pooled = model.pooled(image)
    logits = model(image)
    return {"": logits, "logits": logits, "features": pooled}


def flags(case):
    """1 for each parameter that attention-only fine-tuning trains, by the authors' names."""
    out = {}
    for name, config in case.config.items():
        model = train_only(network(config), "attention", first_branch=True)
        trained = {
            key: torch.tensor(int(value.requires_grad), dtype=torch.int64)
            for key, value in model.named_parameters()
        }
        out |= {f"{name}.{key}": flag for key, flag in keymap().to_theirs(trained).items()}
    return out


def count(name, config):
    with torch.device("meta"):
        model = network(config)
    return sum(p.numel() for p in model.parameters())
