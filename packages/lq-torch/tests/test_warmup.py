"""warmup: every kind of quantized layer, each distinct product once, in the dtype that the layer takes."""

import copy
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from lq_formats import DTypeError, SpecError, search_qparams
from lq_kernels import Arch, ops, registry
from lq_kernels.jit import nvrtc
from lq_kernels.prepare import Unit
from lq_torch import (
    GGMLWeightOnlyConfig,
    Int4DynamicActivationConfig,
    Int4PackedLinear,
    Int4WeightOnlyConfig,
    Int8DynamicActivationConfig,
    Int8Linear,
    Int8WeightOnlyConfig,
    QuantizedLinear,
    problems,
    quantize_,
    replace_linear_with_int4,
    warmup,
)
from lq_torch.problems import problem_of
from lq_torch.tensors import GGMLTensor, Int8PreshuffledTensor
from torch import nn


@pytest.fixture
def calls(monkeypatch):
    """(name, tokens, in features, dtype) of each product that a module runs."""
    seen = []
    for cls in (Int8Linear, Int4PackedLinear):

        def forward(self, x, cls=cls, original=cls.forward):
            assert not torch.is_grad_enabled()
            seen.append((cls.__name__, *x.shape, x.dtype))
            return original(self, x)

        monkeypatch.setattr(cls, "forward", forward)
    return seen


def test_modules_are_run_once_for_each_shape(calls):
    model = nn.Sequential(
        QuantizedLinear.from_linear(nn.Linear(64, 32)),
        Int8Linear(64, 32),
        Int8Linear(64, 48),
        Int4PackedLinear(64, 32, group_size=32),
        Int4PackedLinear(64, 32, group_size=64),
        nn.Linear(64, 32),
    )
    seen = []
    assert warmup(model, [8, 1], lambda *progress: seen.append(progress)) == 8
    expected = [("Int8Linear", 64)] * 4 + [("Int4PackedLinear", 64)] * 4
    assert [(name, k) for name, _, k, _ in calls] == expected
    assert [m for _, m, _, _ in calls] == [1, 8] * 4
    assert [what for _, _, what in seen][::2] == ["0 x 1", "2 x 1", "3 x 1", "4 x 1"]


def test_tensors_and_modules_of_one_model_are_both_run(calls):
    model = nn.Sequential(nn.Linear(64, 64), QuantizedLinear.from_linear(nn.Linear(64, 32)))
    quantize_(model, Int4WeightOnlyConfig(32), lambda module, path: path == "0")
    assert warmup(model, [1, 2]) == 4
    assert len(calls) == 2
    layer = replace_linear_with_int4(nn.Linear(64, 32), 64)
    seen = []
    assert warmup(layer, [3], lambda *progress: seen.append(progress)) == 1
    assert seen == [(0, 1, "Int4PackedLinear x 3")]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_activations_have_the_dtype_of_the_bias_or_of_the_model(calls, bias):
    model = nn.Sequential(nn.Embedding(4, 64), QuantizedLinear.from_linear(nn.Linear(64, 32, bias=bias))).bfloat16()
    warmup(model, [1])
    assert calls.pop()[-1] == torch.bfloat16
    warmup(copy.deepcopy(model), [1], dtype=torch.float16)
    assert calls.pop()[-1] == (torch.bfloat16 if bias else torch.float16)
    warmup(Int8Linear(64, 32, bias=False), [1])
    assert calls.pop()[-1] == torch.get_default_dtype()


def test_what_is_no_size_or_dtype_is_named():
    for sizes in ([0], [-1], [1.0], [True], ["1"], 4, None, (1, "a"), ([1],)):
        with pytest.raises(SpecError, match="batch_sizes"):
            warmup(nn.Linear(8, 8), sizes)
    with pytest.raises(DTypeError, match="float64"):
        warmup(nn.Linear(8, 8), [1], dtype=torch.float64)
    with pytest.raises(SpecError, match=r"expected a torch\.nn\.Module"):
        warmup(torch.zeros(8, 8))
    assert warmup(nn.Linear(8, 8), [1]) == 0


def quantized(config):
    layer = nn.Sequential(nn.Linear(256, 64, dtype=torch.bfloat16))
    quantize_(layer, config)
    return layer[0]


LAYERS = {
    "int4": lambda: quantized(Int4WeightOnlyConfig(128)).weight,
    "int4-row": lambda: quantized(Int4WeightOnlyConfig(-1)).weight,
    "int4-asym": lambda: quantized(Int4WeightOnlyConfig(32, symmetric=False)).weight,
    "int4-preshuffled": lambda: quantized(Int4WeightOnlyConfig(64, int4_packing_format="preshuffled")).weight,
    "int4-packed-linear": lambda: Int4PackedLinear(256, 64, group_size=-1, dtype=torch.bfloat16),
    "int8": lambda: quantized(Int8WeightOnlyConfig()).weight,
    "int8-linear": lambda: Int8Linear(256, 64, dtype=torch.bfloat16),
    "int8-preshuffled": lambda: Int8PreshuffledTensor.from_hp(torch.randn(64, 256, dtype=torch.bfloat16)),
    "int4-fp8": lambda: quantized(Int4DynamicActivationConfig("fp8", group_size=128)).weight,
    "int4-int8": lambda: quantized(Int4DynamicActivationConfig("int8", group_size=-1)).weight,
    "q4_0": lambda: quantized(GGMLWeightOnlyConfig("q4_0")).weight,
    "q4_k": lambda: quantized(GGMLWeightOnlyConfig("q4_k")).weight,
    "q8_0": lambda: quantized(GGMLWeightOnlyConfig("q8_0")).weight,
    "int8-fp8": lambda: quantized(Int8DynamicActivationConfig(activation="fp8")).weight,
}


@pytest.mark.parametrize("reads_fragments", [False, True], ids=["elsewhere", "as-on-hopper"])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_the_problem_of_a_layer_is_the_one_that_its_product_selects_a_kernel_for(make, reads_fragments, monkeypatch):
    monkeypatch.setattr("lq_torch.tensors.ggml.reads_fragments", lambda device: reads_fragments)
    seen = []
    select = ops.select
    monkeypatch.setattr(ops, "select", lambda problem, kernel: seen.append(problem) or select(problem, kernel))
    layer = make()
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    _ = layer(x) if isinstance(layer, nn.Module) else nn.functional.linear(x, layer)
    expected = problem_of(layer, 3, torch.bfloat16)
    assert seen == ([] if expected is None else [expected])
    assert expected is not None or (isinstance(layer, GGMLTensor) and not reads_fragments)


COMPILED = {
    "int4": Int4WeightOnlyConfig(),
    "int8": Int8WeightOnlyConfig(),
    "int4-preshuffled": Int4WeightOnlyConfig(int4_packing_format="preshuffled"),
    "int8-preshuffled": Int8WeightOnlyConfig(int8_packing_format="preshuffled"),
    "int4-fp8": Int4DynamicActivationConfig(),
    "int8-int8": Int8DynamicActivationConfig(),
    "q4_0": GGMLWeightOnlyConfig("q4_0"),
    "q8_0": GGMLWeightOnlyConfig("q8_0"),
}
NOT_COMPILED = {"q5_0": GGMLWeightOnlyConfig("q5_0")}


@pytest.mark.parametrize("capability", [(0, 0), (8, 9), (9, 0)], ids=["cpu", "ada", "hopper"])
@pytest.mark.parametrize("name", [*COMPILED, *NOT_COMPILED])
def test_quantizing_for_the_kernels_of_hopper_starts_the_compiler(name, capability, monkeypatch):
    started = []
    arch = Arch("cuda" if capability[0] else "cpu", capability)
    monkeypatch.setattr(Arch, "of", staticmethod(lambda device: arch))
    monkeypatch.setattr("lq_kernels.cuda.constraints.why_not_compile", lambda: None)
    monkeypatch.setattr(nvrtc, "start", lambda: started.append(name))
    quantize_(nn.Sequential(nn.Linear(256, 32, dtype=torch.bfloat16)), {**COMPILED, **NOT_COMPILED}[name])
    assert set(started) == ({name} if name in COMPILED and capability == (9, 0) else set())


def test_the_compiler_starts_before_scales_are_searched(monkeypatch):
    seen = []
    monkeypatch.setattr("lq_torch.tensors.int4.start_compiler", lambda device: seen.append(device.type))
    monkeypatch.setattr(
        "lq_torch.tensors.int4.search_qparams", lambda *args: seen.append("search") or search_qparams(*args)
    )
    COMPILED["int4-preshuffled"].quantize(torch.randn(32, 256))
    assert seen == ["cpu", "search"]


def test_other_formats_have_no_problem():
    assert problem_of(torch.zeros(3, 4), 1, torch.float32) is None
    assert problem_of(nn.Linear(3, 4), 1, torch.float32) is None


def test_on_a_gpu_every_layer_runs_once_while_kernels_compile_and_the_rest_afterwards(monkeypatch):
    h200 = Arch("cuda", (9, 0), "NVIDIA H200", 132)
    monkeypatch.setattr(problems, "Arch", SimpleNamespace(of=lambda device: h200))
    monkeypatch.setattr("lq_kernels.cuda.constraints.why_not_compile", lambda: None)
    registry.select.cache_clear()
    events = []
    # The package has a function of the module's name.
    module = sys.modules["lq_torch.warmup"]
    unpacked = threading.Event()

    def compiler(unit):
        assert unpacked.wait(10), "compiling keeps layers from running"
        events.append(unit)

    monkeypatch.setattr(module, "onto_gpu", lambda device: compiler)
    model = nn.Sequential(*(nn.Linear(256, 64, dtype=torch.bfloat16) for _ in range(3)))
    model.append(nn.Linear(256, 96, dtype=torch.bfloat16))
    quantize_(model, Int4WeightOnlyConfig(128, int4_packing_format="preshuffled"))

    def linear(x, weight):
        events.append((x.shape[0], weight))
        if len(events) == 4:
            unpacked.set()

    monkeypatch.setattr(nn.functional, "linear", linear)
    steps = []
    count = warmup(model, [3], lambda *step: steps.append(step))
    compiled = [event for event in events if isinstance(event, Unit)]
    runs = [event for event in events if isinstance(event, tuple)]
    assert {(m, id(weight)) for m, weight in events[:4]} == {(1, id(layer.weight)) for layer in model}
    assert events[4 : 4 + len(compiled)] == compiled
    assert len(set(compiled)) == len(compiled), "four layers share what they need"
    assert {unit.source for unit in compiled} == {"decode_a16", "prefill_a16", "dequantize_fragment"}
    assert len(runs) == count == len(steps) - len(compiled)
    sizes = {id(layer.weight): [m for m, weight in runs if weight is layer.weight] for layer in model}
    assert sizes[id(model[0].weight)][:2] == [1, 3]
    assert sizes[id(model[3].weight)][:2] == [1, 3]
    assert sizes[id(model[1].weight)] == sizes[id(model[2].weight)] == [1], "for what is derived from each weight"
    registry.select.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [
        Int4WeightOnlyConfig(128),
        Int4WeightOnlyConfig(128, int4_packing_format="preshuffled"),
        Int8WeightOnlyConfig(),
        Int4DynamicActivationConfig("fp8"),
        Int8DynamicActivationConfig(activation="int8"),
        GGMLWeightOnlyConfig("q4_0"),
    ],
    ids=["int4", "int4-preshuffled", "int8", "int4-fp8", "int8-int8", "q4_0"],
)
def test_after_warming_up_no_number_of_tokens_compiles(config, monkeypatch):
    from lq_kernels.jit import launcher

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    model = nn.Sequential(nn.Linear(1024, 2048), nn.Linear(2048, 1024)).to("cuda", torch.bfloat16)
    quantize_(model, config)
    warmup(model)
    monkeypatch.setattr(launcher, "cubin", None)
    with torch.no_grad():
        for m in (1, 2, 3, 7, 9, 16, 17, 33, 64, 65, 100, 128, 129, 200, 256, 300, 512, 1000, 2048, 5000):
            model(torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16))
    torch.cuda.synchronize()
