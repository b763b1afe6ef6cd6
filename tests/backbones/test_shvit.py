"""SHViT: its equations, what attention sees and what not, two heads, the authors' files."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polypatch import create
from polypatch.backbones import shvit
from polypatch.backbones.shvit import (
    Block,
    Conv,
    Merging,
    SHViT,
    SingleHead,
    distillation_loss,
)
from polypatch.errors import PolypatchError
from polypatch.nn import DropPath, folded


def lived_in(module: nn.Module) -> nn.Module:
    """Weights, gains and running statistics that hide nothing; eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in module.parameters():
            drawn = torch.randn(value.shape, generator=generator)
            value.copy_(1 + 0.3 * drawn if value.ndim == 1 else drawn / value[0].numel() ** 0.5)
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.2, generator=generator)  # type: ignore[union-attr]
                part.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
    return module.eval()


def small(**options) -> SHViT:
    given = {
        "dims": (16, 24, 32),
        "depths": (1, 1, 2),
        "partial": (0, 6, 12),
        "keys": (16, 8, 16),
        "classes": 5,
    }
    model = SHViT(**(given | options))
    model.init_weights()
    return model


# ---- equations, channels first and step by step -------------------------------------------------


def convolved(x: Tensor, layer: Conv) -> Tensor:
    """Convolution without bias, then (y - mean) / sqrt(var + eps) · weight + bias; x: (c, h, w)."""
    conv, norm = layer.conv, layer.norm
    assert conv.bias is None
    assert isinstance(norm, nn.BatchNorm2d)
    y = F.conv2d(x[None], conv.weight, None, conv.stride, conv.padding, groups=conv.groups)[0]
    mean, var, weight, bias = (
        v[:, None, None] for v in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (y - mean) / (var + 1e-5).sqrt() * weight + bias


def attended(x: Tensor, mixing: SingleHead) -> Tensor:
    """Equations of SHSA, cell by cell."""
    _, height, width = x.shape
    a, rest = x[: mixing.partial], x[mixing.partial :]
    a = (a - a.mean()) / (a.var(correction=0) + 1e-5).sqrt()  # one group: a single mean
    a = a * mixing.norm.weight[:, None, None] + mixing.norm.bias[:, None, None]
    qkv = convolved(a, mixing.qkv).flatten(1)
    q, k, v = qkv[: mixing.key], qkv[mixing.key : 2 * mixing.key], qkv[2 * mixing.key :]
    out = torch.zeros(mixing.partial, height * width)
    for cell in range(height * width):
        logits = torch.stack([q[:, cell] @ k[:, other] for other in range(height * width)])
        share = (logits / mixing.key**0.5).exp()
        share = share / share.sum()
        out[:, cell] = sum(share[other] * v[:, other] for other in range(height * width))
    both = torch.cat([out.view(-1, height, width), rest])
    return convolved(both.clamp_min(0), mixing.proj)


def through_block(x: Tensor, block: Block) -> Tensor:
    x = x + convolved(x, block.local)
    if block.mixing is not None:
        x = x + attended(x, block.mixing)
    return x + convolved(convolved(x, block.ffn.expand).clamp_min(0), block.ffn.reduce)


def merged(x: Tensor, merging: Merging) -> Tensor:
    x = convolved(convolved(x, merging.conv1).clamp_min(0), merging.conv2).clamp_min(0)
    gate = merging.se.fc2(merging.se.fc1(x.flatten(1).mean(1)).clamp_min(0)).sigmoid()
    return convolved(x * gate[:, None, None], merging.conv3)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("dim", "partial", "key", "size"),
    [(12, 4, 16, (3, 5)), (12, 7, 4, (4, 2)), (8, 8, 8, (1, 3)), (16, 5, 5, (1, 1))],
)
def test_a_block_is_the_papers(dim, partial, key, size, gradients) -> None:
    mixing = SingleHead(dim=dim, partial=partial, key=key)
    for block in (
        Block(dim=dim, mixing=mixing, drop_path=0.0),
        Block(dim=dim, mixing=None, drop_path=0.0),
    ):
        lived_in(block)
        x = torch.randn(3, dim, *size)
        with torch.no_grad():
            literal = torch.stack([through_block(sample, block) for sample in x])
        with torch.set_grad_enabled(gradients):
            ours = block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).detach()
        torch.testing.assert_close(ours, literal, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("size", [(4, 4), (7, 3), (1, 1)])
def test_a_merging_is_the_papers(size, gradients) -> None:
    merging = lived_in(Merging(dim=12, out=20))
    assert isinstance(merging, Merging)
    x = torch.randn(2, 12, *size)
    with torch.no_grad():
        literal = torch.stack([merged(sample, merging) for sample in x])
    with torch.set_grad_enabled(gradients):
        ours = merging(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).detach()
    assert ours.shape[2:] == tuple(-(-n // 2) for n in size)
    torch.testing.assert_close(ours, literal, rtol=1e-4, atol=1e-4)


def test_the_whole_network_is_the_papers() -> None:
    """Stem without a final ReLU, a pair of blocks around each merging, mean, norm, classifier."""
    model = lived_in(small())
    assert isinstance(model, SHViT)
    x = torch.randn(2, 3, 50, 70)
    outputs = []
    with torch.no_grad():
        for image in x:
            for layer in model.stem:
                image = convolved(image, layer)  # type: ignore[arg-type]
                image = image.clamp_min(0) if layer is not model.stem[-1] else image
            for stage in model.stages:
                for part in stage:  # type: ignore[attr-defined]
                    image = (merged if isinstance(part, Merging) else through_block)(image, part)
            norm, linear = model.head.norm, model.head.linear
            pooled = image.mean((1, 2))
            pooled = (pooled - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
            outputs.append(linear(pooled * norm.weight + norm.bias))
        torch.testing.assert_close(model(x), torch.stack(outputs), rtol=1e-4, atol=1e-4)


# ---- what follows from the design ---------------------------------------------------------------


def test_attention_knows_no_places() -> None:
    mixing = lived_in(SingleHead(dim=12, partial=5, key=4))
    x = torch.randn(2, 3, 4, 12)
    order = torch.randperm(12)

    def shuffled(maps: Tensor) -> Tensor:
        return maps.flatten(1, 2)[:, order].view_as(maps)

    with torch.no_grad():
        torch.testing.assert_close(mixing(shuffled(x)), shuffled(mixing(x)), rtol=1e-4, atol=1e-5)


def test_unattended_channels_stay_where_they_are() -> None:
    """A change in one of the first channels is felt everywhere, in another one at its place."""
    mixing = lived_in(SingleHead(dim=12, partial=5, key=4))
    x = torch.randn(1, 3, 4, 12)
    changes = []
    for channel in (0, 11):
        moved = x.clone()
        moved[0, 1, 2, channel] += 1
        with torch.no_grad():
            changes.append((mixing(moved) - mixing(x)).abs().amax(3)[0] > 0)
    assert changes[0].all()
    assert changes[1].sum() == 1
    assert changes[1][1, 2]


def test_only_attended_channels_are_normed() -> None:
    """Scaling the attended ones changes nothing (up to eps), scaling the others does."""
    mixing = lived_in(SingleHead(dim=12, partial=5, key=4))
    x = torch.randn(1, 3, 4, 12)
    scale = torch.ones(12)
    scale[:5] = 7
    with torch.no_grad():
        torch.testing.assert_close(mixing(x * scale), mixing(x), rtol=1e-3, atol=1e-3)
        assert (mixing(x * (8 - scale)) - mixing(x)).abs().max() > 0.1


def test_fresh_blocks_are_the_identity_but_for_those_at_a_merging() -> None:
    model = small().eval()
    x = torch.randn(2, 4, 4, 24)
    pair, plain = model.stages[1][2], model.stages[1][3]  # type: ignore[index]
    assert plain.mixing is not None
    with torch.no_grad():
        torch.testing.assert_close(plain(x), x)
        assert (pair(x) - x).abs().max() > 0.1
        torch.testing.assert_close(pair(x), pair.local(x))


@pytest.mark.parametrize("size", [(224, 224), (65, 130), (16, 17), (1, 1), (33, 7)])
def test_sides_are_rounded_up(size) -> None:
    model = small().eval()
    with torch.no_grad():
        maps = model.features(torch.randn(1, 3, *size))
    assert [stride for _, stride in maps] == [16, 32, 64]
    for value, stride in maps:
        assert value.shape[2:] == tuple(-(-side // stride) for side in size)


def test_folding_leaves_no_norm_behind_a_convolution_and_no_residual() -> None:
    model = lived_in(small())
    lean = folded(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in lean.modules())
    assert not any(m.residual for m in lean.modules() if isinstance(m, shvit.Local))
    assert all(m.residual for m in model.modules() if isinstance(m, shvit.Local))
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(lean(x), model(x), rtol=1e-3, atol=1e-3)


# ---- training -----------------------------------------------------------------------------------


def test_two_heads_answer_together_and_one_by_one() -> None:
    model = lived_in(small(distilled=True))
    x = torch.randn(3, 3, 64, 64)
    own, pupil = model.both(x)
    assert (own - pupil).abs().max() > 0.01
    torch.testing.assert_close(model(x), (own + pupil) / 2)
    torch.testing.assert_close(model.train()(x).shape, own.shape)
    model.reset_head(4)
    assert [value.shape for value in model.both(x)] == [(3, 4), (3, 4)]
    with pytest.raises(PolypatchError, match="distilled=True"):
        small().both(x)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_distillation_is_deits(alpha) -> None:
    own, pupil, teacher = (torch.randn(4, 6, dtype=torch.float64) for _ in range(3))
    labels = torch.tensor([0, 5, 2, 2])
    plain = -sum(own[i].log_softmax(0)[labels[i]] for i in range(4)) / 4
    hard = -sum(pupil[i].log_softmax(0)[teacher[i].argmax()] for i in range(4)) / 4
    t = 3.0
    p, q = (teacher / t).softmax(1), (pupil / t).softmax(1)
    soft = t * t * (p * (p / q).log()).sum() / 24
    for kind, learned in (("hard", hard), ("soft", soft)):
        found = distillation_loss(
            (own, pupil), labels, teacher, kind=kind, alpha=alpha, temperature=t
        )
        torch.testing.assert_close(found, (1 - alpha) * plain + alpha * learned)
    smooth = F.one_hot(labels, 6).double()
    torch.testing.assert_close(
        distillation_loss((own, pupil), smooth, teacher, alpha=0.0), torch.as_tensor(plain)
    )
    with pytest.raises(PolypatchError, match="kind='medium'"):
        distillation_loss((own, pupil), labels, teacher, kind="medium")


def test_the_teacher_gets_no_gradient_and_each_head_its_own() -> None:
    model = small(distilled=True).train()
    teacher = torch.randn(4, 5, requires_grad=True)
    loss = distillation_loss(
        model.both(torch.randn(4, 3, 64, 64)), torch.arange(4), teacher, kind="soft", alpha=1.0
    )
    loss.backward()
    assert teacher.grad is None
    assert model.head.distilled.linear.weight.grad.abs().sum() > 0
    assert model.head.head.linear.weight.grad.abs().sum() == 0


def test_drop_path_is_on_every_branch() -> None:
    model = shvit.build("shvit-nano", classes=3, drop_path=0.5)
    rates = [m.rate for m in model.modules() if isinstance(m, DropPath)]
    assert len(rates) == 2 * (5 + 4)
    assert set(rates) == {0.5}
    lived_in(model)
    block = model.stages[0][0]  # type: ignore[index]
    x = torch.randn(64, 2, 2, 64)
    with torch.no_grad():
        for part in block.modules():
            part.training = isinstance(part, DropPath)
        same = (block(x) == x).flatten(1).all(1)
    assert 4 <= same.sum() <= 32, "both branches are dropped in a quarter of the samples"


# ---- variants and authors' files ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "plain", "distilled"),
    [
        ("s1", 6_330_808, 6_652_448),
        ("s2", 11_483_072, 11_932_968),
        ("s3", 14_245_273, 14_695_169),
        ("s4", 16_588_484, 17_038_380),
    ],
)
def test_published_sizes(name, plain, distilled) -> None:
    with torch.device("meta"):
        for option, count in ((False, plain), (True, distilled)):
            model = shvit.assemble(shvit.VARIANTS[f"shvit-{name}"], distilled=option)
            assert sum(p.numel() for p in model.parameters()) == count
        again = shvit.network(shvit.official_config(model))
    assert model.preprocessing.resolution == (256 if name == "s4" else 224)
    assert again.preprocessing == model.preprocessing


CONFIGS = {
    "plain": {},
    "two heads": {"distilled": True},
    "no classes": {"classes": 0},
    "no attention": {"partial": (0, 0, 0)},
    "attention everywhere": {"partial": (4, 24, 1), "keys": (3, 16, 7)},
    "a stage without blocks": {"depths": (1, 0, 2)},
    "one merging": {"dims": (16, 16, 32), "merged": (False, True)},
    "two stages": {
        "dims": (16, 32), "depths": (2, 1), "partial": (0, 7), "keys": (16, 16), "merged": (True,)
    },
    "finer": {"patch": 4, "channels": 1, "classes": 2},
}  # fmt: skip


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_what_was_built_is_recognised(options) -> None:
    model = lived_in(small(**options))
    assert isinstance(model, SHViT)
    state = shvit.to_official(model)
    config = shvit.recognise({name: tuple(value.shape) for name, value in state.items()})
    assert config == shvit.official_config(model)
    x = torch.randn(2, options.get("channels", 3), 40, 64)
    with torch.no_grad():
        torch.testing.assert_close(shvit.from_official(config, state)(x), model(x))


def test_the_encoder_of_a_detectors_file_is_read() -> None:
    model = lived_in(small(classes=0))
    assert isinstance(model, SHViT)
    file = {f"backbone.{name}": value for name, value in shvit.to_official(model).items()}
    file |= {"neck.lateral_convs.0.conv.weight": torch.zeros(4), "bbox_head.bias": torch.zeros(3)}
    config = shvit.recognise({name: tuple(value.shape) for name, value in file.items()})
    assert config is not None
    assert config["num_classes"] == 0
    again = shvit.from_official(config, file)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(again.features(x), model.features(x), strict=True):
            torch.testing.assert_close(ours.map, theirs.map)


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"patch_embed.0.c.weight": (8, 3, 3, 3), "patch_embed.0.bn.weight": (8,)},
        {"patch_embed.0.c.weight": (8, 3, 3, 3), "blocks1.0.dw0.m.c.weight": (8, 1, 3, 3)},
    ],
)
def test_other_networks_are_not_recognised(shapes) -> None:
    assert shvit.recognise(shapes) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"depths": (1, 1)}, "one value a stage"),
        ({"patch": 12}, "power of 2"),
        ({"dims": (4, 24, 32)}, "at least half as wide"),
        ({"partial": (0, 25, 12)}, "of 24 channels 25"),
        ({"merged": (False, True)}, "differ in width: 16 and 24"),
    ],
)
def test_quantities_that_do_not_fit(change, says) -> None:
    with pytest.raises(PolypatchError, match=says):
        small(**change)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"types": ["i", "x", "s"]}, "types are"),
        ({"types": ["s", "s"]}, "types are"),
        ({"down_ops": [["subsample", 2], ["pool", 2], [""]]}, "down_ops are"),
        ({"down_ops": [["subsample", 2], ["subsample", 2], ["subsample", 2]]}, "down_ops are"),
        ({"frozen_stages": 0}, "frozen_stages"),
    ],
)
def test_settings_without_meaning(config, says) -> None:
    with pytest.raises(PolypatchError, match=says):
        shvit.network(config)


def test_the_authors_defaults() -> None:
    with torch.device("meta"):
        model = shvit.network({})
    assert (model.dims, model.depths) == ((128, 256, 384), (1, 2, 3))
    assert (model.partial, model.keys) == ((32, 64, 96), (16, 16, 16))


def test_options_of_a_spec() -> None:
    model = create("shvit-nano(patch=8,distilled=True,channels=1)", classes=3)
    assert isinstance(model, SHViT)
    assert model.feature_info[0].stride == 8
    assert model.eval()(torch.randn(1, 1, 32, 40)).shape == (1, 3)
