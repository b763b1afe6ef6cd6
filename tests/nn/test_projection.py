"""The linear layer: what is computed must not depend on which kernel computes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from polypatch.nn import Linear, fresh, linear, projection, quick_gelu

CALLS = "polypatch.nn.projection._onednn"
needs_onednn = pytest.mark.skipif(
    projection._onednn() is None, reason="this build of torch has no oneDNN linear layer"
)


@pytest.fixture
def seen(monkeypatch) -> list[tuple]:
    """Calls of oneDNN's operation."""
    calls: list[tuple] = []
    product = projection._onednn()

    def counted(*arguments):
        calls.append(arguments[3:])
        return product(*arguments)  # type: ignore[misc]

    monkeypatch.setattr(CALLS, lambda: None if product is None else counted)
    return calls


LARGE = ((3, 50, 96), (256, 96))


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "activation", [None, fresh.gelu, fresh.relu, fresh.silu, quick_gelu, torch.tanh]
)
@pytest.mark.parametrize("shape", [(3, 50, 96), (150, 96), (2, 3, 5, 5, 96)])
def test_the_same_values_on_either_way(seen, shape, activation, bias) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    layer = Linear(96, 256, bias=bias).double()
    expected = layer(x, activation)
    assert not seen
    with torch.no_grad():
        found = layer.float()(x.float(), activation)
    assert len(seen) == 1
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_maps_whose_channels_come_first_in_memory(seen) -> None:
    x = torch.randn(2, 96, 10, 10).permute(0, 2, 3, 1)
    weight = torch.randn(256, 96)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-4)
    assert seen


@needs_onednn
@pytest.mark.parametrize("case", ["grad", "small", "bf16", "double", "autocast", "off", "meta"])
def test_who_needs_the_usual_layer_gets_it(seen, case) -> None:
    x, weight = (torch.randn(shape) for shape in LARGE)
    if case == "grad":
        weight.requires_grad_()
        linear(x, weight).sum().backward()
        assert weight.grad is not None
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=case != "off"):
        if case == "small":
            linear(x[:1, :1], weight)
        elif case in ("bf16", "double"):
            dtype = torch.bfloat16 if case == "bf16" else torch.float64
            assert linear(x.to(dtype), weight.to(dtype)).dtype == dtype
        elif case == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert linear(x, weight).dtype == torch.bfloat16
        elif case == "off":
            linear(x, weight)
        elif case == "meta":
            assert linear(x.to("meta"), weight.to("meta")).shape == (3, 50, 256)
    assert not seen


def test_operations_are_counted() -> None:
    x, weight = (torch.randn(shape) for shape in LARGE)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 3 * 50 * 96 * 256


@pytest.mark.parametrize("activation", [None, fresh.gelu])
def test_compiled_and_exported_it_is_the_documented_operation(activation) -> None:
    layer, x = Linear(96, 256).eval(), torch.randn(3, 50, 96)

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, activation)

    with torch.no_grad():
        program = torch.export.export(Both(), (x,))
    assert "mkldnn" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), Both()(x), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_the_compilers_operation_keeps_its_word() -> None:
    """Shapes without data, no aliases, and all else that torch asks of an operation."""
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    for arguments in ((x, weight, bias, "gelu", "none"), (x, weight, None, "none", "")):
        torch.library.opcheck(torch.ops.polypatch.linear.default, arguments)


@pytest.mark.slow  # and not with checked signatures, which break graphs
@needs_onednn
@pytest.mark.parametrize("activation", [None, fresh.gelu, torch.tanh])
def test_compilers_get_onednns_operation_in_inference_alone(activation) -> None:
    torch.compiler.reset()
    layer, x = Linear(96, 256), torch.randn(3, 50, 96)
    graphs = []

    def kept(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(lambda x: layer(x, activation), backend=kept, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x, activation), rtol=1e-5, atol=1e-5)
        torch._dynamo.mark_dynamic(other := torch.randn(7, 50, 96), 0)
        compiled(other)  # a size that is left open
    compiled(x)  # with gradients
    assert ["polypatch" in graph for graph in graphs] == [True, True, False]


def test_it_is_torchs_layer_with_torchs_names() -> None:
    assert isinstance(Linear(3, 4), torch.nn.Linear)
    assert list(Linear(3, 4).state_dict()) == ["weight", "bias"]
