"""Weights in the order of Hopper's tensor cores: the same bits as canonical ones, in memory, in files and in products."""

import copy

import pytest
import torch
from lq_formats import FormatError, SpecError
from lq_torch import (
    Int4PreshuffledTensor,
    Int4Tensor,
    Int4WeightOnlyConfig,
    Int8PreshuffledTensor,
    Int8Tensor,
    Int8WeightOnlyConfig,
    quantize_,
)
from lq_torch.tensors import LowBitTensor
from torch import nn

CASES = [
    pytest.param({"group_size": 128}, id="g128-sym"),
    pytest.param({"group_size": 32, "symmetric": False}, id="g32-asym"),
    pytest.param({"group_size": -1, "scale_dtype": torch.float32}, id="row-sym-fp32"),
    pytest.param({"group_size": 64, "symmetric": False, "scale_dtype": torch.float16}, id="g64-asym-fp16"),
]


def dense(n=48, k=256, dtype=torch.bfloat16, device="cpu"):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)).to(dtype).to(device)


@pytest.mark.parametrize("options", CASES)
def test_int4_has_the_bits_of_the_canonical_weight(options):
    plain, shuffled = Int4Tensor.from_hp(dense(), **options), Int4PreshuffledTensor.from_hp(dense(), **options)
    assert shuffled.packed_nbytes == plain.packed_nbytes or options["group_size"] != 128
    for name, tensor in plain.to_tensors().items():
        assert torch.equal(shuffled.to_tensors()[name], tensor), name
        assert shuffled.to_tensors()[name].dtype == tensor.dtype
    assert torch.equal(shuffled.dequantize(), plain.dequantize())
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    difference = nn.functional.linear(x, shuffled).double() - nn.functional.linear(x, plain).double()
    assert float(difference.norm() / nn.functional.linear(x, plain).double().norm()) < 5e-3


def test_int8_has_the_bits_of_the_canonical_weight():
    plain, shuffled = Int8Tensor.from_hp(dense()), Int8PreshuffledTensor.from_hp(dense())
    assert all(torch.equal(shuffled.to_tensors()[name], tensor) for name, tensor in plain.to_tensors().items())
    assert torch.equal(shuffled.dequantize(), plain.dequantize())
    per_tensor = Int8PreshuffledTensor.from_plain(Int8Tensor.from_hp(dense(), "tensor"))
    assert torch.equal(per_tensor.dequantize(), Int8Tensor.from_hp(dense(), "tensor").dequantize())


@pytest.mark.parametrize("cls", [Int4PreshuffledTensor, Int8PreshuffledTensor])
def test_saved_tensors_are_canonical_and_come_back(cls):
    weight = cls.from_hp(dense())
    tensors, spec = weight.to_tensors(), weight.spec_json()
    assert set(tensors) == {"qdata", "scale"}
    back = LowBitTensor.from_tensors(tensors, spec)
    assert type(back) is cls
    assert torch.equal(back.packed, weight.packed)
    assert torch.equal(back.scale, weight.scale)
    with pytest.raises(FormatError):
        LowBitTensor.from_tensors({**tensors, "qdata": tensors["qdata"][:1]}, spec)


def test_a_file_that_lies_about_its_zeros_is_refused():
    weight = Int4PreshuffledTensor.from_hp(dense(), symmetric=False)
    tensors, spec = weight.to_tensors(), weight.spec_json()
    spec["attributes"]["integer_zero"] = False
    with pytest.raises(FormatError, match="integer_zero"):
        LowBitTensor.from_tensors(tensors, spec)


def test_tensor_protocols():
    weight = Int4PreshuffledTensor.from_hp(dense(dtype=torch.float32), 64)
    x = torch.randn(2, 256)
    expected = nn.functional.linear(x, weight)
    for other in (weight.detach(), weight.clone(), copy.deepcopy(weight), weight.to("cpu")):
        assert torch.equal(nn.functional.linear(x, other), expected)
    assert weight.to(torch.bfloat16).dtype == torch.bfloat16
    compiled = torch.compile(lambda x: nn.functional.linear(x, weight), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)


def test_configurations():
    model = nn.Sequential(nn.Linear(256, 48), nn.Linear(48, 64))
    reference = copy.deepcopy(model)
    quantize_(model, Int4WeightOnlyConfig(48, int4_packing_format="preshuffled"), lambda m, name: name == "1")
    assert type(model[1].weight.data) is Int4PreshuffledTensor
    quantize_(model, Int8WeightOnlyConfig(int8_packing_format="preshuffled"), lambda m, name: name == "0")
    assert type(model[0].weight.data) is Int8PreshuffledTensor
    x = torch.randn(5, 256)
    assert float((model(x) - reference(x)).norm() / reference(x).norm()) < 0.2
    config = Int8WeightOnlyConfig(int8_packing_format="preshuffled")
    assert Int8WeightOnlyConfig.from_json(config.to_json()) == config
    with pytest.raises(SpecError, match="one scale a row"):
        Int8WeightOnlyConfig("tensor", "preshuffled")
    with pytest.raises(SpecError, match="int8_packing_format"):
        Int8WeightOnlyConfig(int8_packing_format="tiled")


@pytest.mark.gpu
@pytest.mark.parametrize("cls", [Int4PreshuffledTensor, Int8PreshuffledTensor])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_on_a_gpu(cls, dtype):
    weight = cls.from_hp(dense(512, 1024, dtype, "cuda"))
    w = weight.dequantize(torch.float64)
    for m in (1, 7, 16, 33, 300):
        x = torch.randn(m, 1024, device="cuda", dtype=dtype)
        exact = x.double() @ w.t()
        y = nn.functional.linear(x, weight)
        assert float((y.double() - exact).norm() / exact.norm()) < (8e-3 if dtype == torch.bfloat16 else 1.5e-3), m
    moved = weight.to("cpu")
    assert torch.equal(moved.packed, weight.packed.cpu())
