"""Every kind of quantized weight: products see what was copied into it, whichever way; and it has products on meta.

Copies are of weights that were multiplied before, of which kernels keep what they made.
"""

import copy
import functools
import gc
import io
import itertools
import pickle
import weakref

import pytest
import torch
from lq_formats import DTypeError, UnsupportedError, pack_int4
from lq_torch import (
    GemliteConfig,
    GGMLWeightOnlyConfig,
    Int4DynamicActivationConfig,
    Int4DynamicTensor,
    Int4Tensor,
    Int4WeightOnlyConfig,
    Int8DynamicActivationConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
)
from lq_torch.tensors.gated import gated_form, gated_linear
from torch import nn
from torch.nn import functional as F  # noqa: N812

N, K, BF16 = 32, 256, torch.bfloat16
CONFIGS = {
    "int4": Int4WeightOnlyConfig(32),
    "int4-asym": Int4WeightOnlyConfig(32, symmetric=False, int4_choose_qparams_algorithm="rtn"),
    "int4-preshuffled": Int4WeightOnlyConfig(32, int4_packing_format="preshuffled"),
    "int4-tile": Int4WeightOnlyConfig(32, int4_packing_format="tile_packed_to_4d"),
    "int4-gemlite": Int4WeightOnlyConfig(32, int4_packing_format="gemlite"),
    "int8": Int8WeightOnlyConfig(),
    "int8-tensor": Int8WeightOnlyConfig("tensor"),
    "int8-preshuffled": Int8WeightOnlyConfig(int8_packing_format="preshuffled"),
    "int8-dynamic": Int8DynamicActivationConfig("int8"),
    "fp8-dynamic": Int8DynamicActivationConfig("fp8"),
    "int4-dynamic": Int4DynamicActivationConfig("int8", 32),
    "int4-fp8": Int4DynamicActivationConfig("fp8", 32),
    "intx": IntxWeightOnlyConfig(3, 32, symmetric=False),
    "gemlite": GemliteConfig(weight="int4", activation="fp8", group_size=32),
    "gemlite-mx": GemliteConfig(weight="mxfp8", activation="none"),
    "q4_0": GGMLWeightOnlyConfig("q4_0"),
    "q6_k": GGMLWeightOnlyConfig("q6_k"),
}


@functools.cache
def quantized(kind, number):
    gated = kind.endswith("-gated")
    dense = torch.randn(N, K)
    dense[0, 0] = 8  # the largest of each: attributes that are computed from a weight's values are equal, too
    weight = CONFIGS[kind.replace("gated", "preshuffled") if gated else kind].quantize(dense.to(BF16))
    return gated_form(weight) if gated else weight


@pytest.fixture(params=[*CONFIGS, "int4-gated", "int8-gated"])
def make(request):
    """Return a function that makes another layer with a weight of this kind."""
    numbers = itertools.count()

    def layer():
        made = nn.Linear(K, N, bias=False, device="meta")
        made.weight = nn.Parameter(quantized(request.param, next(numbers)).clone(), requires_grad=False)
        return made

    return layer


def write_inner(weight, other):
    for name, tensor in weight.inner_tensors().items():
        tensor.copy_(other.inner_tensors()[name])


WAYS = {
    "load": lambda layer, other: layer.load_state_dict(other.state_dict()),
    "weight": lambda layer, other: layer.weight.copy_(other.weight),
    "data": lambda layer, other: layer.weight.data.copy_(other.weight.data),
    "state-dict": lambda layer, other: layer.state_dict()["weight"].copy_(other.state_dict()["weight"]),
    "transposed": lambda layer, other: layer.weight.t().copy_(other.weight.t()),
    "inner": lambda layer, other: write_inner(layer.weight, other.weight),
    "inner-of-detached": lambda layer, other: write_inner(layer.weight.detach(), other.weight),
    "inner-of-data": lambda layer, other: write_inner(layer.weight.data, other.weight),
}


@torch.no_grad()
def test_products_after_a_copy_are_those_of_the_copied_weight(make):
    layer, x = make(), torch.randn(3, K).to(BF16)
    others = [make(), make()]
    references = [x.double() @ other.weight.dequantize(torch.float64).t() for other in others]
    for turn, (name, way) in enumerate(WAYS.items()):
        other, reference = others[turn % 2], references[turn % 2]
        layer(x)
        before, expected = layer(x), other(x)
        way(layer, other)
        assert not torch.equal(before, expected)
        assert torch.equal(layer(x), expected), name
        assert torch.equal(layer(x), expected), name
        assert torch.equal(x @ layer.weight.t(), expected), name
        assert (expected.double() - reference).norm() < 0.05 * reference.norm()


@torch.no_grad()
def test_gated_products_see_a_copy():
    x, weights = torch.randn(3, K).to(BF16), []
    for _ in range(2):
        weights.append(gated_form(CONFIGS["int4-preshuffled"].quantize(torch.randn(N, K).to(BF16))))
    expected = gated_linear(x, weights[1])
    assert not torch.equal(gated_linear(x, weights[0]), expected)
    weights[0].copy_(weights[1])
    assert torch.equal(gated_linear(x, weights[0]), expected)


@pytest.mark.parametrize("made_in", [False, True], ids=["made-before", "made-inside"])
def test_copies_in_inference_mode_are_seen(make, made_in):
    with torch.inference_mode(made_in):
        layer, other = make(), make()
    with torch.inference_mode():
        x = torch.randn(3, K).to(BF16)
        layer(x)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x))
        layer.state_dict()["weight"].copy_(make().weight)
        assert not torch.equal(layer(x), other(x))
        assert torch.equal(torch.mm(x, layer.weight.t()), layer(x))


@pytest.mark.parametrize("name", ["int4", "int8", "int4-preshuffled", "q4_0"])
@torch.no_grad()
def test_compiled_products_and_copies_see_each_other(name):
    weights = [CONFIGS[name].quantize(torch.randn(N, K).to(BF16)) for _ in range(3)]
    x = torch.randn(3, K).to(BF16)
    product = torch.compile(lambda x, w: F.linear(x, w), fullgraph=True, backend="aot_eager")
    replace = torch.compile(lambda w, other: w.copy_(other), fullgraph=True, backend="aot_eager")
    product(x, weights[0])
    weights[0].copy_(weights[1])
    assert torch.equal(product(x, weights[0]), F.linear(x, weights[1]))
    F.linear(x, weights[0])
    replace(weights[0], weights[2])
    assert torch.equal(product(x, weights[0]), F.linear(x, weights[2]))
    assert torch.equal(F.linear(x, weights[0]), F.linear(x, weights[2]))


@torch.no_grad()
def test_aliases_share_memory_and_copies_do_not(make):
    layer, other, x = make(), make(), torch.randn(3, K).to(BF16)
    expected, inner = layer(x), layer.weight.inner_tensors()
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    twins = [copy.deepcopy(layer), make()]
    twins[1].load_state_dict(torch.load(stream), assign=True)
    if all(tensor.element_size() > 1 or not tensor.is_floating_point() for tensor in inner.values()):
        twins.append(pickle.loads(pickle.dumps(layer)))  # torch does not unpickle fp8
    assert all(tensor is inner[name] for name, tensor in layer.weight.detach().inner_tensors().items())
    layer.weight.copy_(other.weight)
    assert not torch.equal(layer(x), expected)
    assert all(torch.equal(twin(x), expected) for twin in twins)


@torch.no_grad()
def test_a_weight_that_was_copied_into_is_freed(make):
    gc.freeze()  # what is there already need not be looked through
    try:
        layer, x = make(), torch.randn(3, K).to(BF16)
        layer(x)
        layer.load_state_dict(make().state_dict())
        layer(x)
        inner = [weakref.ref(tensor) for tensor in layer.weight.inner_tensors().values()]
        del layer
        gc.collect()
    finally:
        gc.unfreeze()
    assert all(reference() is None for reference in inner)


INT4 = Int4WeightOnlyConfig
UNLIKE = {
    "zeros": (INT4(32, symmetric=False, int4_choose_qparams_algorithm="rtn"), INT4(32, symmetric=False), "zero"),
    "no-zeros": (INT4(32), INT4(32, symmetric=False), "zero"),
    "scales": (INT4(32, scale_dtype=torch.float16), INT4(32, scale_dtype=torch.float32), "scale"),
    "intx-zeros": (
        IntxWeightOnlyConfig(3, 32, symmetric=False, choose_qparams_algorithm="rtn"),
        IntxWeightOnlyConfig(3, 32, symmetric=False),
        "zero",
    ),
    "group-size": (INT4(32), INT4(64), "group_size"),
    "row-into-tensor": (Int8WeightOnlyConfig("tensor"), Int8WeightOnlyConfig(), "scale"),
    "tensor-into-row": (Int8WeightOnlyConfig(), Int8WeightOnlyConfig("tensor"), "scale"),
    "ggml-type": (GGMLWeightOnlyConfig("q4_0"), GGMLWeightOnlyConfig("q8_0"), "ggml_type"),
}


@pytest.mark.parametrize("case", UNLIKE)
@torch.no_grad()
def test_nothing_is_written_where_quantizations_differ(case):
    ours, theirs, name = UNLIKE[case]
    weights = [config.quantize(torch.randn(N, K).to(BF16)) for config in (ours, theirs)]
    for weight, other in (weights, weights[::-1]):
        before = {key: tensor.clone() for key, tensor in weight.inner_tensors().items()}
        with pytest.raises(UnsupportedError, match=f"cannot copy .*{name}.* into .*{name}.*equally quantized"):
            weight.copy_(other)
        with pytest.raises(UnsupportedError, match=f"cannot assign .*{name}.* into .*{name}.*equally quantized"):
            weight.data = other
        assert all(torch.equal(tensor, before[key]) for key, tensor in weight.inner_tensors().items())


@pytest.mark.parametrize("through", [lambda w: w, lambda w: w.detach(), lambda w: w.data], ids=["it", "detach", "data"])
@torch.no_grad()
def test_what_depends_on_the_values_of_a_weight_is_copied_with_them(through):
    dense, x = torch.randn(N, K), torch.randn(3, K).to(BF16)
    gemlite = CONFIGS["gemlite"]
    small, large = (gemlite.quantize((dense * factor).to(BF16)) for factor in (1, 1000))
    assert small.exponent != large.exponent
    plain = CONFIGS["int4"].quantize(dense.to(BF16))
    codes = [torch.randint(low, 16, (N, K), dtype=torch.uint8) for low in (1, 0)]
    without, with_lowest = (
        Int4DynamicTensor.from_plain(
            Int4Tensor.from_packed(pack_int4(each), plain.scale, None, group_size=32, in_features=K, dtype=BF16)
        )
        for each in codes
    )
    assert (without.lowest, with_lowest.lowest) == (False, True)
    free, forced = (CONFIGS["int4-gemlite"].quantize(dense.to(BF16)) for _ in range(2))
    forced.kernel = "GEMM"
    for target, source in ((small, large), (without, with_lowest), (free, forced)):
        weight = nn.Parameter(target, requires_grad=False)
        kept = copy.deepcopy(weight)
        product = torch.compile(lambda x, w: F.linear(x, w), fullgraph=True, backend="eager")
        product(x, weight)
        through(weight).copy_(source)
        assert weight.attributes() == source.attributes() == target.attributes()
        assert weight.attributes() != kept.attributes()
        assert torch.equal(weight.dequantize(), source.dequantize())
        assert torch.equal(product(x, weight), F.linear(x, source))
        twin = pickle.loads(pickle.dumps(weight))
        assert twin.attributes() == weight.attributes()


@torch.no_grad()
def test_data_is_assigned(make):
    layer, other, x = make(), make(), torch.randn(3, K).to(BF16)
    layer(x)
    weight, expected = layer.weight, other(x)
    weight.data = other.weight.data
    assert layer.weight is weight
    assert isinstance(weight, nn.Parameter)
    assert torch.equal(layer(x), expected)
    assert torch.equal(x @ weight.t(), expected)
    assert all(tensor is other.weight.inner_tensors()[name] for name, tensor in weight.inner_tensors().items())
    weight.data = weight.data.half()
    assert weight.dtype == weight.dequantize().dtype == torch.float16


def test_data_of_another_kind_or_shape_is_refused(make):
    weight, other = make().weight, quantized("intx" if "intx" not in repr(make().weight).lower() else "int8", 0)
    before = weight.dequantize()
    for wrong in (before, other, type(weight)(weight.inner_tensors(), weight.attributes(), (N + 8, K), weight.dtype)):
        with pytest.raises(UnsupportedError, match="cannot assign"):
            weight.data = wrong
    assert weight.shape == (N, K)
    assert torch.equal(weight.dequantize(), before)


def test_products_on_meta_have_the_shape_and_dtype_of_others(make):
    layer = make()
    layer.weight.copy_(make().weight)
    meta, bias = layer.to("meta"), torch.empty(N, dtype=BF16, device="meta")
    for shape in ((2, 3, K), (2, 3, K), (0, K), (K,)):
        x = torch.empty(shape, dtype=BF16, device="meta")
        for y in (meta(x), F.linear(x, meta.weight, bias), *((x @ meta.weight.t(),) if len(shape) > 1 else ())):
            assert (y.device.type, y.shape, y.dtype) == ("meta", (*shape[:-1], N), BF16)
    with torch.autocast("cpu", dtype=torch.float16):
        assert meta(torch.empty(1, K, dtype=BF16, device="meta")).dtype == BF16


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_integers_are_no_dense_weight(make, device):
    weight = make().weight.to(device)
    for dtype in (torch.int8, torch.int32, torch.bool):
        with pytest.raises(DTypeError, match=str(dtype)):
            weight.dequantize(dtype)
    assert weight.dequantize(torch.float64).dtype == torch.float64
