"""Fast products of linear modules: the same numbers, only where they pay, and hooks as ever."""

import copy

import pytest
import torch
from tolerances import allowed_error, largest, rounding
from torch import nn

from thought_kernels.models import linear as linear_module
from thought_kernels.models.linear import FEWEST_PRODUCTS, FastLinear
from thought_kernels.models.undisturbed import undisturbed

available = pytest.mark.skipif(not linear_module._AVAILABLE, reason="needs AVX-512 and a torch with oneDNN")


def products(call):
    """Names of the matrix products that torch runs in call()."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        call()
    return {event.name for event in profile.events()} & {
        "aten::addmm",
        "aten::mm",
        "aten::bmm",
        "mkldnn::_linear_pointwise",
    }


def condition(x, weight, bias=0.0):
    """The error that the order of additions may make in one linear module."""
    sums = x.double().abs() @ weight.double().abs().mT + torch.as_tensor(bias).double().abs()
    return rounding(x.shape[-1] + 1, torch.float32) * largest(sums)


def enough(width: int) -> int:
    return FEWEST_PRODUCTS // width**2 + 1


@available
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (3,)])
def test_products_are_those_of_the_linear_module(bias, leading):
    module, x = nn.Linear(192, 80, bias=bias), torch.randn(*leading, 96, 192)
    module.register_forward_hook(lambda _, args, out: 2 * out)
    with torch.no_grad(), FastLinear():
        out = module(x)
    weight, x = module.weight.double(), x.double()
    exact = 2 * (x @ weight.T + (module.bias.double() if bias else 0))
    plain = 2 * nn.functional.linear(x.float(), module.weight, module.bias)
    allowed = allowed_error(exact, plain, condition=2 * condition(x, weight, module.bias if bias else 0.0))
    assert largest(out.double() - exact) <= allowed


@available
def test_long_sums_err_no_more_than_one_chain_of_additions():
    module, x = nn.Linear(2048, 64, bias=False), torch.randn(64, 2048)
    with torch.no_grad(), FastLinear():
        out = module(x)
    exact = x.double() @ module.weight.double().mT
    assert (out - exact).norm() <= 2048**0.5 * torch.finfo(torch.float32).eps / 2 * exact.norm()


@available
def test_large_float32_products_are_onednns_and_others_torchs_own():
    def used(module, x):
        with FastLinear():
            return products(lambda: module(x))

    module, rows = nn.Linear(128, 128, bias=False), enough(128)
    assert used(module, torch.randn(rows, 128)) == {"mkldnn::_linear_pointwise"}
    assert "mkldnn::_linear_pointwise" not in used(module, torch.randn(rows - 2, 128))
    assert "mkldnn::_linear_pointwise" not in used(module.double(), torch.randn(rows, 128).double())
    assert "mkldnn::_linear_pointwise" not in products(lambda: module.float()(torch.randn(rows, 128)))


def test_gradients_flow_through_torchs_own_product():
    module, x = nn.Linear(128, 128), torch.randn(enough(128), 128, requires_grad=True)
    with FastLinear():
        module(x).sum().backward()
    assert x.grad is not None and module.weight.grad is not None


@available
@pytest.mark.parametrize(
    "bias",
    [torch.randn(1), torch.tensor(3.0), torch.randn(96, 2)[:, 0], torch.randn(1, 96), torch.randn(200, 96)],
    ids=["one", "scalar", "strided", "row", "matrix"],
)
def test_biases_that_onednn_misreads_are_added_by_torch(bias):
    x, weight = torch.randn(200, 128), torch.randn(96, 128)
    with torch.no_grad(), FastLinear():
        out = nn.functional.linear(x, weight, bias)
    exact = x.double() @ weight.double().mT + bias.double()
    allowed = allowed_error(exact, x @ weight.mT + bias, condition=condition(x, weight, bias))
    assert largest(out.double() - exact) <= allowed


@available
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_weights_and_autocast_keep_torchs_own_product():
    x, weight = torch.randn(200, 128), torch.randn(96, 128)
    for operand in (weight.to_sparse_csr(), weight):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=operand is weight):
            expected = nn.functional.linear(x, operand)
            with FastLinear():
                out = nn.functional.linear(x, operand)
        assert torch.equal(out, expected) and out.dtype == expected.dtype


@available
def test_wrong_shapes_raise_torchs_own_error():
    with torch.no_grad(), FastLinear(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        nn.Linear(128, 128)(torch.randn(200, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [1, 5])
def test_rows_cut_from_longer_ones_are_multiplied_together(batch, bias, dtype):
    """As a head's input is, the last token of each row: torch alone would multiply by W once for each of them."""
    module = nn.Linear(64, 96, bias=bias, dtype=dtype).requires_grad_(False)  # with gradients torch does it by itself
    last = torch.randn(batch, 7, 64, dtype=dtype)[:, -1:]
    if batch > 1 or not bias:  # else there is nothing to mend
        assert products(lambda: module(last)) == {"aten::bmm"}
    with torch.no_grad(), FastLinear():
        found = products(lambda: module(last))
        assert found and found <= {"aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"}
        out = module(last)
    exact = last.double() @ module.weight.double().mT + (module.bias.double() if bias else 0)
    terms = last.double().abs() @ module.weight.double().abs().mT + (module.bias.double().abs() if bias else 0)
    assert out.dtype == dtype and out.shape == (batch, 1, 96)
    assert largest(out.double() - exact) <= 2 * rounding(65, dtype) * largest(terms)


def test_gradients_flow_through_rows_cut_from_longer_ones():
    module = nn.Linear(64, 96).double().requires_grad_(False)
    x = torch.randn(3, 7, 64, dtype=torch.float64, requires_grad=True)
    module(x[:, -2:]).square().sum().backward()
    expected, x.grad = x.grad, None
    with FastLinear():
        module(x[:, -2:]).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


@available
def test_linear_modules_of_an_undisturbed_model_are_fast_and_then_as_they_were():
    model = nn.Sequential(nn.Linear(128, 128, bias=False), nn.Linear(128, 128), nn.Linear(128, 128))
    model[2].forward = own = lambda x: 2 * x
    x = torch.randn(enough(128), 128)
    before = [dict(vars(module)) for module in model]
    with undisturbed(model), undisturbed(model):
        assert products(lambda: model(x)) == {"mkldnn::_linear_pointwise"}
        assert model[2].forward is own
        copied = copy.deepcopy(model)
    assert "mkldnn::_linear_pointwise" not in products(lambda: model(x))
    assert [dict(vars(module)) for module in model] == before
    with torch.no_grad():
        model[0].weight.zero_()
        assert copied[0](x).abs().max() > 0  # of its own weight


def in_graph(graph):
    return {str(node.target) for node in graph.graph.nodes}


def test_compiled_graphs_hold_torchs_own_product_alone():
    seen, model = [], nn.Sequential(nn.Linear(128, 128))

    def backend(graph, inputs):
        seen.append(in_graph(graph))
        return graph.forward

    x = torch.randn(enough(128), 128)
    with torch.no_grad(), undisturbed(model):
        out = torch.compile(model, backend=backend)(x)
    assert seen and not any("mkldnn" in target for graph in seen for target in graph)
    assert largest(out - model(x)) <= 2 * condition(x, model[0].weight, model[0].bias)


def test_forward_derivatives_are_right_without_gradients():
    weight, x, change = torch.randn(128, 128), torch.randn(enough(128), 128), torch.randn(enough(128), 128)
    with torch.no_grad():
        _, tangent = torch.func.jvp(lambda value: linear_module.linear(value, weight), (x,), (change,))
    assert largest(tangent - change @ weight.mT) <= 2 * condition(change, weight)


@available
def test_weights_whose_rows_overlap_are_multiplied_by_torch():
    x, weight = torch.randn(enough(128), 128), torch.randn(400).as_strided((128, 128), (1, 2))
    with torch.no_grad():
        found = linear_module.linear(x, weight)
    assert largest(found - x @ weight.mT) <= 2 * condition(x, weight)
