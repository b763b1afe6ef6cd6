"""What every complete encoder promises, asked of the small variant of each (``<slug>-nano``).

A paper's own equations are tested in its own file; here stand the promises that dense heads,
commands and exporters rely on. A new encoder is found through the catalogue.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from polypatch import catalogue, create
from polypatch.errors import PolypatchError
from polypatch.nn import Backbone, folded, load_exactly, pad_to


def encoders() -> list[str]:
    chosen = [p for p in catalogue.papers(room="backbones") if p.works]
    extra = [catalogue.paper("patch-scaling")]
    return [f"{p.slug}-nano" for p in (*chosen, *extra) if p.works]


def module_of(name: str):
    return importlib.import_module(catalogue.paper(name.removesuffix("-nano")).module)


def made(name: str, **options) -> Backbone:
    model = create(name, classes=7, seed=3, **options)
    assert isinstance(model, Backbone)
    return model


def images(model: Backbone, *size: int, batch: int = 2, seed: int = 0) -> Tensor:
    """Random images of the nearest size that the network permits."""
    size = size or (64, 64)
    generator = torch.Generator().manual_seed(seed)
    height, width = model.input_requirements.nearest(*size)
    return torch.randn(batch, 3, height, width, generator=generator)


def norms_of(model: nn.Module) -> Iterator[nn.BatchNorm2d]:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            yield module  # type: ignore[misc]


def lived_in(model: Backbone) -> Backbone:
    """Eval mode, with statistics, gains and weights that aren't those of a fresh network, which
    hide wrong orders, and hardly look at the image where they begin small."""
    generator = torch.Generator().manual_seed(5)
    for norm in norms_of(model):
        norm.running_mean.normal_(0, 0.1, generator=generator)  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
    with torch.no_grad():
        for value in model.parameters():
            size = 0.1 if value.ndim <= 1 else 0.3 * value[0].numel() ** -0.5
            value.add_(size * torch.randn(value.shape, generator=generator))
    return model.eval()


each = pytest.mark.parametrize("name", encoders())


@each
def test_a_batch_is_its_samples_one_by_one(name: str) -> None:
    model = lived_in(made(name))
    x = images(model, 64, 64, batch=3)
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(x[k : k + 1]) for k in range(3)])
    assert together.shape == (3, 7)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.std(0).min() > 0, "the output does not depend on the image"


@each
def test_gradients_do_not_change_the_result(name: str) -> None:
    """Inference takes shortcuts (memory is reused); its results must be those of training's path,
    and the input must be left alone."""
    model = lived_in(made(name))
    x = images(model, 64, 64)
    kept = x.clone()
    with_gradient = model(x).detach()
    with torch.inference_mode():
        without = model(x)
        again = model(x)
    torch.testing.assert_close(without, with_gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, without, rtol=0, atol=0)
    assert torch.equal(x, kept)


@each
@pytest.mark.parametrize("size", [(64, 64), (64, 96), (77, 50)], ids=str)
def test_maps_have_the_announced_shapes(name: str, size: tuple[int, int]) -> None:
    model = lived_in(made(name))
    x = images(model, *size)
    with torch.no_grad():
        maps = model.features(x)
        assert model(x).shape == (2, 7)
    assert len(maps) == len(model.feature_info)
    for (value, stride), info in zip(maps, model.feature_info):
        assert (value.shape[1], stride) == (info.dim, info.stride)
        for cells, side in zip(value.shape[2:], x.shape[2:]):
            assert cells in (side // stride, -(-side // stride)), (value.shape, stride, x.shape)
        assert value.isfinite().all()
    strides = [stride for _, stride in maps]
    assert strides == sorted(strides), "finest first"


@each
def test_sizes_that_are_not_permitted_are_named(name: str) -> None:
    model = made(name).eval()
    requirements = model.input_requirements
    wrong = torch.zeros(1, 3, 61, 67)
    if requirements.nearest(61, 67) == (61, 67):
        wrong = torch.zeros(1, 3, 1, 1)
        if requirements.nearest(1, 1) == (1, 1):
            assert model(wrong).shape == (1, 7)
            return
    with pytest.raises(PolypatchError, match="the input is"):
        model(wrong)
    if requirements.exact is None:
        with torch.no_grad():
            assert model(pad_to(wrong, requirements)).shape == (1, 7)


@each
def test_gradients_reach_every_parameter(name: str) -> None:
    model = made(name).train()
    x = images(model, 64, 64, batch=4)
    for value in model.parameters():  # zero-initialised gains would hide what lies behind them
        if value.ndim <= 1:
            nn.init.normal_(value, 0.5, 0.1)
    (model(x) * torch.randn(4, 7, generator=torch.Generator().manual_seed(1))).sum().backward()
    without = [
        n
        for n, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    ]
    assert not without


@each
def test_checkpointing_changes_memory_only(name: str) -> None:
    model = made(name).eval()  # no dropout, running statistics fixed
    x = images(model, 64, 64)
    gradients = []
    for on in (False, True):
        model.zero_grad()
        model.checkpointed(on)
        # train mode of the container alone: blocks stay as they are
        model.training = True
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)


@each
def test_bf16(name: str) -> None:
    """Autocast and a network cast as a whole stay near float32."""
    model = lived_in(made(name))
    x = images(model, 64, 64)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = model(x).float()
        whole = model.bfloat16()(x.bfloat16()).float()
    scale = exact.abs().max()
    assert (cast - exact).abs().max() < 0.1 * scale
    assert (whole - exact).abs().max() < 0.15 * scale


@each
def test_heads_are_replaced(name: str) -> None:
    model = made(name).eval()
    x = images(model, 64, 64)
    model.reset_head(3)
    with torch.no_grad():
        assert model(x).shape == (2, 3)
        model.reset_head(0)
        assert model(x).shape[0] == 2
        torch.testing.assert_close(model(x).flatten(1), model.pooled(x).flatten(1))


@each
def test_initialisation_fills_everything(name: str) -> None:
    """A network from the meta device: every parameter and buffer gets its value from
    ``init_weights``, and the same as one that never was on the meta device."""
    with torch.device("meta"):
        model = made(name)
    model = model.to_empty(device="cpu")
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point():
            value.data.fill_(float("nan"))
        else:
            value.data.fill_(10**6)
    torch.manual_seed(3)
    model.init_weights()  # type: ignore[operator]
    for label, value in (*model.named_parameters(), *model.named_buffers()):
        assert value.isfinite().all(), f"{label} is left as it was"
    for label, value in model.named_buffers():
        if not value.is_floating_point():
            assert (value < 10**6).all(), f"{label} is left as it was"
    built = made(name)
    torch.manual_seed(3)
    built.init_weights()  # type: ignore[operator]
    x = images(model, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), built.eval()(x))


@each
def test_weight_decay_knows_its_parameters(name: str) -> None:
    model = made(name)
    names = {n for n, _ in model.named_parameters()}
    spared = model.no_decay()
    assert spared <= names
    assert {n for n, p in model.named_parameters() if p.ndim <= 1} <= spared
    assert names - spared, "no parameter would be decayed"
    for part in model.undecayed:
        assert any(part in n for n in names), f"no parameter is called {part}"


@each
def test_authors_layout_round_trips(name: str) -> None:
    """ours → the authors' keys → recognised → rebuilt: same output, same keys."""
    module = module_of(name)
    if not hasattr(module, "to_official"):
        pytest.skip("the authors published no code whose keys could be written")
    model = lived_in(made(name))
    theirs = module.to_official(model)
    found = module.recognise({n: tuple(v.shape) for n, v in theirs.items()})
    assert found is not None, "not recognised"
    config = {**found, **module.official_config(model)}
    told = {k: v for k, v in found.items() if k not in module.ASSUMED}
    assert {k: config[k] for k in told} == told, "what shapes tell differs from what was built"
    again = module.from_official(config, theirs)
    assert set(again.state_dict()) == set(model.state_dict())
    x = images(model, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)
    broken = dict(theirs)
    broken["nobody.knows.this"] = torch.zeros(1)
    with pytest.raises(PolypatchError, match=r"nobody\.knows\.this"):
        module.from_official(config, broken)
    some = next(iter(theirs))
    broken = {n: v for n, v in theirs.items() if n != some}
    with pytest.raises(PolypatchError):
        module.from_official(config, broken)


@each
def test_state_round_trips_exactly(name: str) -> None:
    model = lived_in(made(name))
    again = made(name)
    load_exactly(again, model.state_dict(), what=name)
    x = images(model, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), model(x), rtol=0, atol=0)


@each
def test_folded_norms_give_the_same(name: str) -> None:
    model = lived_in(made(name))
    x = images(model, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(folded(model)(x), model(x), rtol=1e-3, atol=1e-4)


@each
def test_variants_are_in_one_table(name: str) -> None:
    module = module_of(name)
    slug = name.removesuffix("-nano")
    assert all(variant.startswith(f"{slug}-") for variant in module.VARIANTS)
    with torch.device("meta"):
        for variant in module.VARIANTS:
            model = create(variant)
            assert isinstance(model, Backbone)
            assert model.preprocessing.resolution > 0
    assert sum(p.numel() for p in made(name).parameters()) < 1.5e6, "nano is for a CPU"


@pytest.mark.slow
@each
def test_compiles_as_one_graph(name: str) -> None:
    model = lived_in(made(name))
    reason = getattr(module_of(name), "NO_FULL_GRAPH", "")
    if reason:
        pytest.skip(reason)
    torch.compiler.reset()
    x = images(model, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-3, atol=1e-4
        )


@pytest.mark.slow
@each
def test_exports(name: str) -> None:
    """``torch.export`` with a batch of any size."""
    model = lived_in(made(name))
    x = images(model, 64, 64)
    with torch.no_grad():
        program = torch.export.export(
            model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
        )
        more = images(model, 64, 64, batch=3, seed=1)
        torch.testing.assert_close(program.module()(more), model(more), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@each
def test_onnx(name: str, tmp_path) -> None:
    """The classifier in onnxruntime."""
    runtime = pytest.importorskip("onnxruntime", reason="needs polypatch[onnx]")
    pytest.importorskip("onnxscript", reason="needs polypatch[onnx]")
    model = lived_in(made(name))
    x = images(model, 64, 64)
    file = tmp_path / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(model, (x,), str(file), dynamo=True, verbose=False)
        session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        (theirs,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(theirs), model(x), rtol=1e-3, atol=1e-4)
