"""merge_linears(fuse_epilogue=True): gated MLPs as one fused product, the same bits in files, the same function."""

import copy
import warnings

import pytest
import torch
from lq_formats import DTypeError, ShapeError
from lq_kernels import Arch, batch_invariant
from lq_torch import (
    Int4WeightOnlyConfig,
    Int8WeightOnlyConfig,
    LowBitTensor,
    dequantize_,
    load,
    merge_linears,
    quantize_,
    save_pretrained,
    unmerge_linears,
    warmup,
)
from lq_torch.problems import problem_of
from lq_torch.tensors import GatedTensor, Int4GatedTensor, Int4PreshuffledTensor, Int8GatedTensor, Int8PreshuffledTensor
from lq_torch.tensors.gated import gated_form, gated_linear
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CONFIGS = {
    "int4-g32-sym": Int4WeightOnlyConfig(32, int4_packing_format="preshuffled"),
    "int4-g64-asym": Int4WeightOnlyConfig(64, symmetric=False, int4_packing_format="preshuffled"),
    "int4-row": Int4WeightOnlyConfig(-1, int4_packing_format="preshuffled"),
    "int8-row": Int8WeightOnlyConfig(int8_packing_format="preshuffled"),
}


class MLP(nn.Module):
    def __init__(self, hidden=96, bias=True, activation=nn.SiLU):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(64, hidden, bias=bias) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(hidden, 64), activation()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Counter(TorchDispatchMode):
    """The operators of lq that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lq":
            self.seen.append(func._schema.name.removeprefix("lq::"))
        return func(*args, **(kwargs or {}))


def mlp(config="int4-g32-sym", dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = MLP(**options).to(dtype).requires_grad_(False).eval()
    quantize_(model, CONFIGS[config], lambda module, path: path != "down_proj")
    return model


def activations(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, 64, generator=torch.Generator().manual_seed(2)).to(device, dtype)


def exact(model, x):
    """The MLP of the dequantized weights in float64."""

    def product(layer, x):
        w = layer.weight.dequantize(torch.float32) if isinstance(layer.weight, LowBitTensor) else layer.weight
        return nn.functional.linear(x, w.double(), None if layer.bias is None else layer.bias.double())

    x = x.double()
    return product(model.down_proj, nn.functional.silu(product(model.gate_proj, x)) * product(model.up_proj, x))


def operators(model, x):
    with Counter() as counter, torch.no_grad():
        model(x)
    return counter.seen


def assert_same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert list(one) == list(other)
    for name, value in one.items():
        assert type(value) is type(other[name]), name
        if isinstance(value, LowBitTensor):
            assert value.attributes() == other[name].attributes()
        for a, b in zip(_tensors(value), _tensors(other[name]), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), name


def _tensors(value):
    return list(value.inner_tensors().values()) if isinstance(value, LowBitTensor) else [value]


# ---- tensors ----


@pytest.mark.parametrize("hidden", [96, 44, 4])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_weight_keeps_its_bits_and_its_meaning(config, hidden):
    weight = CONFIGS[config].quantize(torch.randn(2 * hidden, 64))
    gated = gated_form(weight)
    assert type(gated) is (Int8GatedTensor if config == "int8-row" else Int4GatedTensor)
    assert gated_form(gated) is gated
    assert (gated.shape, gated.dtype, gated.attributes()) == (weight.shape, weight.dtype, weight.attributes())
    assert gated.packed_nbytes <= weight.packed_nbytes * (1 if hidden % 8 == 0 else 2.1)
    assert torch.equal(gated.dequantize(), weight.dequantize())
    back = type(weight).from_plain(gated.plain())
    for name, tensor in weight.inner_tensors().items():
        assert torch.equal(back.inner_tensors()[name], tensor)
    x, bias = torch.randn(3, 2, 64), torch.randn(2 * hidden)
    torch.testing.assert_close(nn.functional.linear(x, gated, bias), nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(x @ gated.t(), x @ weight.t())
    gate, up = nn.functional.linear(x, weight, bias).chunk(2, -1)
    torch.testing.assert_close(gated_linear(x, gated, bias), nn.functional.silu(gate) * up)


def test_files_do_not_know_of_it():
    weight = CONFIGS["int4-g64-asym"].quantize(torch.randn(64, 64))
    gated = gated_form(weight)
    assert gated.spec_json() == weight.spec_json()
    again = LowBitTensor.from_tensors(gated.to_tensors(), gated.spec_json())
    assert type(again) is Int4PreshuffledTensor
    assert torch.equal(again.packed, weight.packed)


def test_operands_are_checked():
    gated = gated_form(CONFIGS["int8-row"].quantize(torch.randn(32, 64)))
    with pytest.raises(ShapeError, match=r"needs \(\.\.\., 64\)"):
        gated_linear(torch.randn(2, 32), gated)
    with pytest.raises(ShapeError, match=r"bias has shape \(16,\)"):
        gated_linear(torch.randn(2, 64), gated, torch.randn(16))
    with pytest.raises(DTypeError, match="x has dtype"):
        gated_linear(torch.randn(2, 64).half(), gated)
    with torch.autocast("cpu", torch.bfloat16):
        assert gated_linear(torch.randn(2, 64), gated, torch.randn(32)).dtype == torch.bfloat16
    with pytest.raises(ShapeError, match=r"\(31, 64\): expected \(2 H, K\)"):
        gated_form(CONFIGS["int8-row"].quantize(torch.randn(31, 64)))


def test_it_moves_and_copies_as_a_weight_does():
    gated = gated_form(CONFIGS["int4-g32-sym"].quantize(torch.randn(32, 64)))
    for other in (
        copy.deepcopy(gated),
        gated.clone(),
        gated.detach(),
        gated.to(torch.bfloat16),
        nn.Parameter(gated, False),
    ):
        assert isinstance(other, Int4GatedTensor)
        assert torch.equal(other.packed, gated.packed)


def test_problems_are_those_of_the_fused_product():
    for config in CONFIGS.values():
        gated = gated_form(config.quantize(torch.randn(32, 64)))
        problem = problem_of(gated, 7, torch.float32)
        assert (problem.op, problem.m, problem.n, problem.k) == ("preshuffled_gated", 7, 32, 64)
        assert problem.arch == Arch.of("cpu")
    assert problem_of(config.quantize(torch.randn(32, 64)), 7, torch.float32).op == "preshuffled"


# ---- models ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (0, 4), (5,)], ids=["M1", "M21", "M0", "2d"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_function_is_the_same(config, bias, shape, dtype, device):
    model = mlp(config, dtype, bias=bias, hidden=88).to(device)
    x = activations(*shape, dtype=dtype, device=device)
    want = exact(model, x)
    with torch.no_grad():
        before = model(x)
        assert merge_linears(model, fuse_epilogue=True) == ["gate_up_proj"]
        after = model(x)
    assert isinstance(model.gate_up_proj.weight, GatedTensor)
    assert after.dtype == before.dtype
    if x.numel():
        bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert float((after.double() - want).norm() / want.norm()) < bound
    if device == "cpu":
        assert operators(model, x) == ["preshuffled_gated_linear"]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("hidden", [96, 44])
def test_unmerging_restores_the_bits(config, hidden):
    model = mlp(config, hidden=hidden)
    apart = copy.deepcopy(model)
    x = activations(2, 3)
    merge_linears(model, fuse_epilogue=True)
    assert_same_weights(model, apart)
    assert unmerge_linears(model) == ["gate_proj", "up_proj"]
    assert_same_weights(model, apart)
    assert torch.equal(model(x), apart(x))


def test_state_dicts_go_in_and_out_under_the_separate_names():
    apart, fused = mlp("int4-g64-asym"), mlp("int4-g64-asym")
    with torch.no_grad():
        for tensor in _tensors(fused.up_proj.weight):
            tensor.zero_()
    merge_linears(fused, fuse_epilogue=True)
    x = activations(4)
    assert not torch.allclose(fused(x), apart(x))
    for assign in (False, True):
        assert fused.load_state_dict(apart.state_dict(), assign=assign) == ([], [])
        assert isinstance(fused.gate_up_proj.weight, Int4GatedTensor)
        torch.testing.assert_close(fused(x), apart(x))
    assert_same_weights(fused, apart)


def test_checkpoints_do_not_know_of_it(tmp_path):
    model = mlp()
    save_pretrained(model, tmp_path / "apart")
    merge_linears(model, fuse_epilogue=True)
    save_pretrained(model, tmp_path / "fused")
    names = sorted(path.name for path in (tmp_path / "apart").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "fused").iterdir())
    apart, fused = (load_file(tmp_path / folder / "model-00001-of-00001.safetensors") for folder in ("apart", "fused"))
    assert apart.keys() == fused.keys()
    assert all(torch.equal(tensor, fused[name]) for name, tensor in apart.items())
    assert_same_weights(load(tmp_path / "fused", MLP()), load(tmp_path / "apart", MLP()))


def test_merged_before_quantizing_is_fused_afterwards():
    model = MLP().requires_grad_(False)
    with pytest.warns(UserWarning, match="(?s)left epilogues apart:.*the model: its weight is a Parameter, not presh"):
        merge_linears(model, fuse_epilogue=True)
    quantize_(model, CONFIGS["int8-row"])
    x = activations(3)
    assert operators(model, x) == ["preshuffled_linear"] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert merge_linears(model, fuse_epilogue=True) == []
        assert merge_linears(model, fuse_epilogue=True) == []
    assert operators(model, x) == ["preshuffled_gated_linear", "preshuffled_linear"]


def test_without_the_option_nothing_is_fused():
    model = mlp()
    x = activations(3)
    assert merge_linears(model) == ["gate_up_proj"]
    assert type(model.gate_up_proj.weight) is Int4PreshuffledTensor
    assert operators(model, x) == ["preshuffled_linear"]


@pytest.mark.parametrize("activation", [nn.GELU, lambda: nn.SiLU(inplace=True)], ids=["gelu", "inplace"])
def test_other_activations_are_left_and_named(activation):
    model = mlp(activation=activation)
    apart = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="left epilogues apart:\n  the model: its act_fn is a"):
        merge_linears(model, fuse_epilogue=True)
    torch.testing.assert_close(model(activations(3)), apart(activations(3)))


@pytest.mark.parametrize("where", ["gate_proj", "up_proj", "gate_up_proj", "act_fn"])
def test_whoever_watches_sees_what_it_saw(where):
    model = mlp()
    merge_linears(model, fuse_epilogue=True)
    x, seen = activations(3), []
    want = model(x)
    handle = model.get_submodule(where).register_forward_hook(lambda *_: seen.append(where))
    torch.testing.assert_close(model(x), want)
    assert seen == [where]
    handle.remove()
    assert operators(model, x) == ["preshuffled_gated_linear"]
    model.act_fn = nn.Tanh()
    y = model.gate_up_proj(x)
    torch.testing.assert_close(model(x), model.down_proj(torch.tanh(y[:, :96]) * y[:, 96:]))


def test_a_fused_weight_can_be_dequantized_and_replaced():
    model = mlp()
    x = activations(3)
    want = model(x)
    merge_linears(model, fuse_epilogue=True)
    again = copy.deepcopy(model)
    dequantize_(again)
    assert type(again.gate_up_proj.weight) is nn.Parameter
    torch.testing.assert_close(again(x), want)
    model.gate_up_proj = nn.Sequential(model.gate_up_proj)  # an adapter around it
    torch.testing.assert_close(model(x), want)
    with pytest.warns(UserWarning, match="the model: gate_up_proj was replaced by a Sequential"):
        merge_linears(model, fuse_epilogue=True)


def test_gradients_reach_the_input_and_the_bias():
    model = mlp()
    apart = copy.deepcopy(model)
    merge_linears(model, fuse_epilogue=True)
    model.gate_up_proj.bias.requires_grad_(True)
    apart.gate_proj.bias.requires_grad_(True)
    inputs = []
    for each in (model, apart):
        x = activations(2, 3).requires_grad_()
        each(x).square().sum().backward()
        inputs.append(x.grad)
    torch.testing.assert_close(*inputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.gate_up_proj.bias.grad[:96], apart.gate_proj.bias.grad, rtol=1e-4, atol=1e-5)


def test_compiles_into_one_graph():
    model = mlp()
    x = activations(2, 3)
    merge_linears(model, fuse_epilogue=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        x.add_(1)
        torch.testing.assert_close(compiled(x), model(x))
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with batch_invariant():  # is traced anew
            torch.testing.assert_close(compiled(x), model(x))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_warmup_runs_the_fused_product():
    model = mlp()
    merge_linears(model, fuse_epilogue=True)
    with Counter() as counter:
        assert warmup(model, [1, 3]) == 2
    assert counter.seen == ["preshuffled_gated_linear"] * 2


def test_the_bundled_model_says_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    data = pytest.importorskip("lq_eval.data")
    model = transformers.AutoModelForCausalLM.from_pretrained(data.tiny_llama_path(), dtype=torch.float32).eval()
    tokens = torch.randint(0, model.config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(3))
    quantize_(model, CONFIGS["int4-g32-sym"])
    with torch.no_grad():
        want = model(tokens).logits
        text = model.generate(tokens, max_new_tokens=8, do_sample=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            paths = merge_linears(model, fuse_epilogue=True)
        assert len(paths) == 2 * model.config.num_hidden_layers
        assert operators(model.model.layers[0].mlp, torch.randn(1, model.config.hidden_size)) == [
            "preshuffled_gated_linear",
            "preshuffled_linear",
        ]
        torch.testing.assert_close(model(tokens).logits, want, rtol=1e-4, atol=1e-4)
        assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False), text)
        save_pretrained(model, tmp_path)
        assert torch.equal(load(tmp_path)(tokens).logits, want)
    assert isinstance(model.model.layers[0].self_attn.qkv_proj.weight, Int4PreshuffledTensor)
    assert not isinstance(model.model.layers[0].self_attn.qkv_proj.weight, Int8PreshuffledTensor | GatedTensor)
