"""Weights in gemlite's packing: bits, gemlite's integers, files, errors, and the call; on a GPU, gemlite itself."""

import json
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from lq_formats import (
    DeviceError,
    FormatError,
    GroupSizeError,
    MissingPackageError,
    ShapeError,
    SpecError,
    UnknownVersionError,
    UnsupportedError,
    pack_bits,
)
from lq_formats.layouts import GEMLITE
from lq_torch import (
    GemliteConfig,
    GemliteTensor,
    Int4GemliteTensor,
    Int4Tensor,
    Int8Tensor,
    LowBitTensor,
    force_kernel,
    load_kernel_cache,
    quantize_,
    save_kernel_cache,
    warmup,
)
from lq_torch.integrations import gemlite as integration
from lq_torch.tensors import gemlite_meta
from torch import nn

NAMES = ("GEMV", "GEMV_REVSPLITK", "GEMV_SPLITK", "GEMM_SPLITK", "GEMM")


class FakeLinear:
    saved: ClassVar = {"GEMM": {"(1, 2)": {"BLOCK_SIZE_M": 16}}}
    loaded: ClassVar = []

    @classmethod
    def cache_config(cls, filename):
        with open(filename, "w") as file:
            json.dump(cls.saved, file)

    @classmethod
    def load_config(cls, filename, print_error=True, overwrite=False):
        with open(filename) as file:
            cls.loaded.append(json.load(file))
        return True


@pytest.fixture
def gemlite(monkeypatch):
    calls = []

    def forward_functional(x, bias, tensor_args, meta_args, matmul_type=-1):
        calls.append((bias, tensor_args, meta_args, matmul_type))
        return x.new_zeros(*x.shape[:-1], tensor_args[0].shape[1])

    core = SimpleNamespace(
        forward_functional=forward_functional,
        GEMLITE_MATMUL_TYPES_MAPPING={name: i for i, name in enumerate(NAMES)},
        GemLiteLinearTriton=FakeLinear,
        calls=calls,
    )
    monkeypatch.setitem(sys.modules, "gemlite.core", core)
    monkeypatch.setattr(integration, "_stamp", lambda: {"gpu": "G", "gemlite": "0.6.0", "triton": "3.6.0"})
    FakeLinear.loaded = []
    return core


def test_packs_low_codes_first():
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 1] = 7.0, -7.0
    t = Int4GemliteTensor.from_hp(w, 32)
    # Codes 15, 1, then the midpoint 8 six times; the other words hold the midpoint only.
    assert [word & 0xFFFFFFFF for word in t.qdata.flatten().tolist()] == [0x8888881F, *[0x88888888] * 3]
    assert t.scale.tolist() == [[1.0]]
    assert t.zero.item() == 8
    torch.testing.assert_close(t.dequantize(), w, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("bits", "group", "dtype", "expected"),
    [
        (4, 128, torch.bfloat16, [0, 4, 128, 15, 8, 2, 2, 0, 2, 0, 3, 1]),
        (4, -1, torch.float16, [0, 4, 256, 15, 8, 1, 1, 0, 0, 1, 1, 1]),
        (8, 64, torch.float32, [0, 8, 64, 255, 4, 0, 0, 0, 0, 0, 3, 1]),
        (1, 64, torch.float16, [0, 1, 64, 1, 32, 1, 1, 0, 1, 0, 4, 1]),
    ],
    ids=["int4-g128", "int4-row", "int8-g64", "int1-g64"],
)
def test_integers_are_those_of_gemlites_pack(bits, group, dtype, expected):
    assert Int4GemliteTensor.from_hp(torch.randn(8, 256).to(dtype), group, bits).meta_args() == expected


def same_bits(a, b):
    assert (type(a), a.spec_json()) == (type(b), b.spec_json())
    assert a.inner_tensors().keys() == b.inner_tensors().keys()
    for name, tensor in a.inner_tensors().items():
        other = b.inner_tensors()[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
        assert tensor.is_contiguous() == other.is_contiguous()
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("group", [16, 128, -1])
@pytest.mark.parametrize("rows", [1, 8])
def test_saves_canonical_codes(bits, group, rows):
    w = torch.randn(rows, 256)
    t = Int4GemliteTensor.from_hp(w, group, bits)
    saved = t.to_tensors()
    assert torch.equal(saved["qdata"], pack_bits(GEMLITE.unpack(t.qdata, bits), bits, torch.int32))
    assert torch.equal(saved["scale"], t.scale.t())
    same_bits(LowBitTensor.from_tensors(saved, t.spec_json()), t)
    if bits == 4:
        plain = Int4Tensor.from_hp(w, group).to_tensors()
        assert saved.keys() == plain.keys()
        assert all(torch.equal(saved[name], plain[name]) for name in plain)


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1.0, 1e30])
def test_int4_and_int8_for_low_bit_activations_save_canonical_codes(size):
    w = torch.randn(8, 256) * size
    int4 = GemliteTensor.from_hp(w, "int4", "fp8", 128)
    for name, tensor in Int4Tensor.from_hp(w, 128).to_tensors().items():
        assert torch.equal(int4.to_tensors()[name], tensor)
    same_bits(LowBitTensor.from_tensors(int4.to_tensors(), int4.spec_json()), int4)
    int8 = GemliteTensor.from_hp(w, "int8", "int8")
    plain = Int8Tensor(int8.to_tensors(), {}, w.shape, w.dtype)
    assert torch.equal(plain.dequantize(), int8.dequantize())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("group", [16, 128, -1])
def test_round_trips_through_tensors_and_json(bits, group):
    t = Int4GemliteTensor.from_hp(torch.randn(8, 256), group, bits)
    back = LowBitTensor.from_tensors(t.to_tensors(), json.loads(json.dumps(t.spec_json())))
    same_bits(back, t)
    x = torch.randn(3, 256)
    torch.testing.assert_close(nn.functional.linear(x, back), x @ t.dequantize().t())


def test_equals_the_plain_format():
    w = torch.randn(8, 256)
    assert torch.equal(Int4GemliteTensor.from_hp(w, 64).dequantize(), Int4Tensor.from_hp(w, 64).dequantize())


@pytest.mark.parametrize(
    ("weight", "activation", "bound"),
    [
        ("int8", "int8", 0.02),
        ("fp8", "fp8", 0.04),
        ("int4", "int8", 0.2),
        ("int4", "fp8", 0.2),
        ("mxfp8", "none", 0.04),
        ("mxfp4", "mxfp8", 0.15),
    ],
)
def test_dynamic_formats_round_trip(weight, activation, bound):
    w = torch.randn(8, 256, dtype=torch.bfloat16)
    t = GemliteConfig(weight, activation).quantize(w)
    back = LowBitTensor.from_tensors(t.to_tensors(), json.loads(json.dumps(t.spec_json())))
    same_bits(back, t)
    assert (t.dequantize(torch.float32) - w).norm() / w.float().norm() < bound


def test_mxfp4_keeps_representable_values_and_rounds_ties_to_even():
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    kept = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    w = torch.tensor([[*values, *(-v for v in values), 0.0, 0.0]], dtype=torch.bfloat16)
    expected = torch.tensor([[*kept, *(-v for v in kept), 0.0, 0.0]])
    assert torch.equal(GemliteTensor.from_hp(w, "mxfp4", "none").dequantize(torch.float32), expected)


@pytest.mark.parametrize(("bits", "dtype"), [(1, torch.uint8), (2, torch.int16), (4, torch.int32)])
def test_small_groups_hold_two_items(bits, dtype):
    # gemlite's pruner drops every GEMV configuration whose tile is smaller than an item.
    t = Int4GemliteTensor.from_hp(torch.randn(8, 256), 16, bits)
    assert t.qdata.dtype == dtype
    assert t.meta_args()[4] == t.qdata.dtype.itemsize * 8 // bits
    assert 2 * t.meta_args()[4] <= 16


@pytest.mark.parametrize(
    ("tokens", "bits", "columns", "size", "kernel"),
    [
        (1, 4, 4096, 128, None),
        (8, 4, 4096, 128, None),
        (4, 4, 11008, 128, None),
        (5, 4, 11008, 128, "GEMM"),
        (8, 4, 11008, 64, None),
        (3, 8, 11008, 256, "GEMM"),
        (1, 4, 4096, 16, "GEMV_REVSPLITK"),
        (64, 4, 4096, 16, "GEMV_REVSPLITK"),
    ],
)
def test_replaces_kernels_that_gemlite_computes_wrongly(tokens, bits, columns, size, kernel):
    assert gemlite_meta.safe_kernel(None, tokens, bits, columns, size) == kernel


@pytest.mark.parametrize(("kernel", "columns", "size"), [("GEMM_SPLITK", 11008, 128), ("GEMM", 4096, 16)])
def test_refuses_to_force_a_kernel_that_computes_wrongly(kernel, columns, size):
    with pytest.raises(GroupSizeError, match=kernel):
        gemlite_meta.safe_kernel(kernel, 8, 4, columns, size)


def test_one_scale_a_row_is_float32():
    # gemlite multiplies the whole sum of codes by it, in its dtype: float16 would overflow.
    assert Int4GemliteTensor.from_hp(torch.randn(8, 256).half(), -1, 8).scale.dtype == torch.float32


@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_int4_groups_for_fp8_are_in_e4m3s_normal_range(size):
    w = torch.randn(8, 256) * size
    t = GemliteTensor.from_hp(w, "int4", "fp8", 128)
    assert 1 <= 8 * float(t.scale.max()) < 2
    torch.testing.assert_close(t.dequantize(), Int4Tensor.from_hp(w, 128).dequantize(), rtol=1e-6, atol=0)


def test_refuses_what_gemlite_cannot_take():
    with pytest.raises(ShapeError, match="32"):
        Int4GemliteTensor.from_hp(torch.randn(4, 48), 16)
    for group in (8, 48, 5):
        with pytest.raises(GroupSizeError):
            Int4GemliteTensor.from_hp(torch.randn(4, 96), group)
    with pytest.raises(SpecError):
        Int4GemliteTensor.from_hp(torch.randn(4, 64), 32, 3)
    with pytest.raises(UnsupportedError, match="int8 x int8"):
        GemliteConfig("fp8", "int8")
    with pytest.raises(SpecError, match="GEMM_SPLITK"), force_kernel("gemm"):
        pass


def test_check_names_what_does_not_fit():
    t = Int4GemliteTensor.from_hp(torch.randn(8, 256), 64)
    tensors = t.to_tensors()
    with pytest.raises(FormatError, match="zero"):
        LowBitTensor.from_tensors({**tensors, "zero": t.zero}, t.spec_json())
    for wrong in (t.qdata, tensors["qdata"][:-1], tensors["qdata"].float()):
        with pytest.raises(FormatError, match="qdata"):
            LowBitTensor.from_tensors({**tensors, "qdata": wrong}, t.spec_json())
    with pytest.raises(FormatError, match="scale"):
        LowBitTensor.from_tensors({**tensors, "scale": t.scale}, t.spec_json())


def test_calls_gemlite_with_four_tensors_and_integers(gemlite):
    t = Int4GemliteTensor.from_hp(torch.randn(8, 256), 64)
    args = (t.qdata, t.scale, t.zero), t.meta_args()
    integration.gemlite_linear(torch.randn(2, 256), None, *args)
    with force_kernel("GEMM_SPLITK"):
        integration.gemlite_linear(torch.randn(2, 256), None, *args)
        integration.gemlite_linear(torch.randn(2, 256), None, *args, kernel="GEMV")
    assert [call[3] for call in gemlite.calls] == [-1, 3, 0]
    _, tensors, meta, _ = gemlite.calls[0]
    assert len(tensors) == 4
    assert tensors[3].shape == ()
    assert all(type(value) is int for value in meta)


def test_a_trained_bias_keeps_its_gradient(gemlite):
    t = Int4GemliteTensor.from_hp(torch.randn(8, 256), 64)
    bias = torch.zeros(8, requires_grad=True)
    integration.gemlite_linear(torch.randn(2, 256), bias, (t.qdata, t.scale, t.zero), t.meta_args()).sum().backward()
    assert gemlite.calls[0][0] is None
    assert bias.grad.tolist() == [2.0] * 8


def test_kernel_cache_round_trips_and_refuses_others(gemlite, tmp_path):
    path = tmp_path / "cache.json"
    save_kernel_cache(path)
    load_kernel_cache(path)
    assert FakeLinear.loaded == [FakeLinear.saved]
    assert list(tmp_path.iterdir()) == [path]
    record = json.loads(path.read_text())
    for change, error in (
        ({"version": 2}, UnknownVersionError),
        ({"format": "x"}, FormatError),
        ({"gpu": "other"}, FormatError),
        ({"configs": {"GEMM": {"k": [1]}}}, FormatError),
    ):
        path.write_text(json.dumps(record | change))
        with pytest.raises(error):
            load_kernel_cache(path)
    path.write_text('{"format"')
    with pytest.raises(FormatError, match="not JSON"):
        load_kernel_cache(path)


def test_names_the_missing_package_or_gpu():
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises((MissingPackageError, DeviceError)):
        integration.load_gemlite()


def test_warmup_runs_each_distinct_weight_once():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 32))
    quantize_(model, GemliteConfig(), progress=False)
    seen = []
    assert warmup(model, [4, 1, 4], lambda done, total, what: seen.append((done, total, what))) == 4
    assert [done for done, _, _ in seen] == [0, 1, 2, 3]
    assert seen[0][1] == 4
    with pytest.raises(SpecError):
        warmup(model, [0])


def test_compiles_into_one_graph_with_the_kernel_that_is_forced(gemlite):
    t = Int4GemliteTensor.from_hp(torch.randn(8, 256), 64)

    @torch.compile(fullgraph=True, backend="eager")
    def product(x):
        kernel = integration.current_kernel(None)
        return integration.gemlite_linear(x, None, (t.qdata, t.scale, t.zero), t.meta_args(), kernel)

    assert product(torch.randn(2, 256)).shape == (2, 8)
    with force_kernel("GEMM"):
        product(torch.randn(2, 256))
    assert [call[3] for call in gemlite.calls] == [-1, 4]


_BF16, _FP16 = torch.bfloat16, torch.float16


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("config", "dtype", "m", "k", "bound"),
    [
        # Each compiles and times some 17 configurations: fp16 by every kernel that gemlite chooses, bf16 by one.
        *(pytest.param(GemliteConfig(), _FP16, m, 512, 1e-2, id=f"int4-g128-fp16-M{m}") for m in (1, 8, 64)),
        pytest.param(GemliteConfig(), _BF16, 8, 512, 1e-2, id="int4-g128-bf16-M8"),
        pytest.param(GemliteConfig(group_size=16), _FP16, 8, 512, 1e-2, id="int4-g16-fp16-M8"),
        # Splits do not divide K: gemlite's own choice would read scales behind the last.
        pytest.param(GemliteConfig(), _FP16, 8, 640, 1e-2, id="int4-g128-fp16-M8-K640"),
        pytest.param(GemliteConfig("int8"), _FP16, 8, 512, 1e-2, id="int8-g128-fp16-M8"),
        pytest.param(GemliteConfig("int8", group_size=-1), _FP16, 8, 512, 1e-2, id="int8-row-fp16-M8"),
        pytest.param(GemliteConfig("int2"), _FP16, 8, 512, 1e-2, id="int2-g128-fp16-M8"),
        pytest.param(GemliteConfig("int1"), _FP16, 8, 512, 1e-2, id="int1-g128-fp16-M8"),
        pytest.param(GemliteConfig("int8", "int8"), _BF16, 8, 512, 3e-2, id="int8-x-int8-bf16-M8"),
        pytest.param(GemliteConfig("fp8", "fp8"), _BF16, 8, 512, 6e-2, id="fp8-x-fp8-bf16-M8"),
        pytest.param(GemliteConfig("int4", "int8"), _BF16, 8, 512, 3e-2, id="int4-x-int8-bf16-M8"),
        pytest.param(GemliteConfig("int4", "fp8", 128), _BF16, 8, 512, 6e-2, id="int4-g128-x-fp8-bf16-M8"),
        pytest.param(GemliteConfig("mxfp8"), _BF16, 8, 512, 1e-2, id="mxfp8-bf16-M8"),
        pytest.param(GemliteConfig("mxfp4"), _BF16, 8, 512, 1e-2, id="mxfp4-bf16-M8"),
        pytest.param(GemliteConfig("mxfp4", "mxfp8"), _BF16, 8, 512, 6e-2, id="mxfp4-x-mxfp8-bf16-M8"),
    ],
)
def test_gemlite_matches_float64(config, dtype, m, k, bound):
    pytest.importorskip("gemlite", reason="gemlite is not installed")
    torch.manual_seed(0)
    t = config.quantize(torch.randn(256, k, device="cuda", dtype=dtype) / 20)
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    reference = x.double() @ t.dequantize(torch.float32).double().t()
    with torch.no_grad():
        y = nn.functional.linear(x, t).double()
    assert (y - reference).norm() / reference.norm() < bound


@pytest.mark.gpu
def test_packs_what_gemlite_packs():
    core = pytest.importorskip("gemlite", reason="gemlite is not installed").core
    w = torch.randn(64, 256, device="cuda", dtype=_FP16)
    codes = torch.randint(0, 16, w.shape, device="cuda", dtype=torch.uint8)
    codes[:, 0] = 15
    t = Int4GemliteTensor.from_hp((codes.to(_FP16) - 8) / 8, 256 // 2)
    layer = core.GemLiteLinear(4, 128, 256, 64, core.DType.FP16, core.DType.FP16)
    layer.pack(GEMLITE.unpack(t.qdata, 4), t.scale.t().contiguous(), 8, None)
    for ours, theirs in zip((t.qdata, t.scale, t.zero), layer.get_tensor_args(), strict=False):
        assert torch.equal(ours, theirs)
    assert t.meta_args() == layer.get_meta_args()
