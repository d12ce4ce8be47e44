"""merge_linears: the same bits and the same function with fewer products, names as before, refusals with reasons.

One long file: what is merged and what must be refused are the same small modules, changed in one thing each.
"""

import copy
import gc
import io
import pickle
import threading
import warnings

import pytest
import torch
from lq_formats import ShapeError, SpecError, UnsupportedError
from lq_torch import (
    GGMLWeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    LowBitTensor,
    load,
    merge_linears,
    quantize_,
    replace_linear_with_int4,
    save_pretrained,
    unmerge_linears,
)
from torch import nn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CONFIGS = {
    "int4-g32-sym": Int4WeightOnlyConfig(32),
    "int4-g32-asym": Int4WeightOnlyConfig(32, symmetric=False),
    "int4-row-sym": Int4WeightOnlyConfig(-1),
    "int8-row": Int8WeightOnlyConfig(),
    "q4_0": GGMLWeightOnlyConfig(),
    "q8_0": GGMLWeightOnlyConfig("q8_0"),
    "int3-g32-asym": IntxWeightOnlyConfig(3, 32, symmetric=False),
    "dense": None,
}
QKV = ("q_proj", "k_proj", "v_proj")
TOKENS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """What the forward of a Hugging Face attention does with its input."""

    def __init__(self, biases=(True, True, True), dim=64):
        super().__init__()
        self.q_proj = nn.Linear(dim, 64, bias=biases[0])
        self.k_proj = nn.Linear(dim, 32, bias=biases[1])
        self.v_proj = nn.Linear(dim, 32, bias=biases[2])
        self.o_proj = nn.Linear(64, dim)

    def forward(self, hidden_states, scale=1.0):
        shape = hidden_states.shape[:-1]
        q = self.q_proj(hidden_states).view(*shape, 4, 16).transpose(-2, -3)
        k = self.k_proj(hidden_states).view(*shape, 2, 16).transpose(-2, -3)
        v = self.v_proj(hidden_states).view(*shape, 2, 16).transpose(-2, -3)
        k, v = (heads.repeat_interleave(2, -3) for heads in (k, v))
        # Written out: the fused kernels of CUDA refuse an empty batch in 16 bits.
        out = torch.softmax(q @ k.transpose(-1, -2) * scale, -1) @ v
        return self.o_proj(out.transpose(-2, -3).flatten(-2)).to(hidden_states.device)


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.self_attn = Attention(**options)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return x + self.self_attn(self.norm(x))


def block(config="int4-g32-sym", dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    model = Block(**options).to(dtype).eval()
    if CONFIGS[config] is not None:
        quantize_(model, CONFIGS[config])
    return model


def activations(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, 64, generator=torch.Generator().manual_seed(2)).to(device, dtype)


def entries(model):
    """Every tensor of a state dict, quantized weights taken apart."""
    found = {}
    for name, value in model.state_dict().items():
        inner = value.to_tensors() if isinstance(value, LowBitTensor) else {"": value}
        found |= {f"{name}:{key}": tensor for key, tensor in inner.items()}
    return found


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, True)], ids="{0}".format)
def test_the_bits_are_those_of_the_separate_layers(config, biases):
    model = block(config, biases=biases).requires_grad_(False)
    apart = copy.deepcopy(model)
    assert merge_linears(model) == ["self_attn.qkv_proj"]
    merged = model.self_attn.qkv_proj
    assert merged.weight.shape == (128, 64)
    assert (merged.bias is None) == (not any(biases))
    start = 0
    for name, bias in zip(QKV, biases, strict=True):
        layer = apart.self_attn.get_submodule(name)
        rows = slice(start, start + layer.out_features)
        start = rows.stop
        if isinstance(layer.weight, LowBitTensor):
            assert type(merged.weight) is type(layer.weight)
            assert merged.weight.attributes() == layer.weight.attributes()
            inner = merged.weight.to_tensors()
            assert inner.keys() == layer.weight.to_tensors().keys()
            for key, tensor in layer.weight.to_tensors().items():
                assert torch.equal(inner[key][rows], tensor)
        else:
            assert torch.equal(merged.weight[rows], layer.weight)
        if bias:
            assert torch.equal(merged.bias[rows], layer.bias)
        elif any(biases):
            assert not merged.bias[rows].any()
    assert list(model.state_dict()) == list(apart.state_dict())
    assert_same_bits(entries(model), entries(apart))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (0, 4), (5,)], ids=["M1", "M21", "M0", "2d"])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_function_is_the_same(config, shape, dtype, device):
    model = block(config, dtype).to(device)
    x = activations(*shape, dtype=dtype, device=device)
    with torch.no_grad():
        before = model(x)
        merge_linears(model)
        after = model(x)
    assert after.dtype == before.dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(after, before, atol=tolerance, rtol=tolerance)
    if config == "q4_0" and device == "cpu":  # integer arithmetic, each out feature by itself
        assert torch.equal(after, before)


@pytest.mark.parametrize("config", CONFIGS)
def test_unmerging_restores_the_modules(config):
    model = block(config, biases=(True, False, True)).requires_grad_(False)
    before = copy.deepcopy(model)
    originals = {name: model.self_attn.get_submodule(name) for name in QKV}
    modules, cls = [name for name, _ in model.named_modules()], type(model.self_attn)
    merge_linears(model)
    assert type(model.self_attn) is not cls
    assert unmerge_linears(model) == [f"self_attn.{name}" for name in QKV]
    assert type(model.self_attn) is cls
    assert [name for name, _ in model.named_modules()] == modules
    for name, layer in originals.items():
        assert model.self_attn.get_submodule(name) is layer
        assert type(layer.weight) is type(before.self_attn.get_submodule(name).weight)
    assert_same_bits(entries(model), entries(before))
    assert torch.equal(model(activations(2, 3)), before(activations(2, 3)))
    for one, other in zip(originals.values(), list(originals.values())[1:], strict=False):
        if not isinstance(one.weight, LowBitTensor):
            assert one.weight.untyped_storage().data_ptr() != other.weight.untyped_storage().data_ptr()
    assert unmerge_linears(model) == []


def test_the_weights_exist_once():
    model = block("dense")
    merge_linears(model)
    gc.collect()
    count = sum(parameter.numel() for parameter in model.self_attn.parameters())
    assert count == 64 * 128 + 128 + 64 * 64 + 64
    assert sorted(name for name, _ in model.self_attn.named_parameters()) == [
        "o_proj.bias", "o_proj.weight", "qkv_proj.bias", "qkv_proj.weight",
    ]  # fmt: skip


def test_one_product_where_there_were_three():
    model, calls = block("dense"), []
    merge_linears(model)
    model.self_attn.qkv_proj.register_forward_hook(lambda *_: calls.append("qkv"))
    model.self_attn.o_proj.register_forward_hook(lambda *_: calls.append("o"))
    model(activations(2))
    assert calls == ["qkv", "o"]


def test_nothing_of_an_input_outlives_the_call():
    model = block()
    merge_linears(model)
    x = activations(3, 4)
    with torch.no_grad():
        first = model(x).clone()
        x.mul_(-2)  # the same object with other values
        second = model(x)
        fresh = model(x.clone())
    assert torch.equal(second, fresh)
    assert not torch.equal(first, second)


def test_an_exception_leaves_nothing_behind():
    model = block()
    merge_linears(model)
    x = activations(3, 4)
    want = model(x)
    handle = model.self_attn.k_proj.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(KeyError("in the middle"))
    )
    with pytest.raises(KeyError):
        model(-x)
    handle.remove()
    assert torch.equal(model(x), want)


def test_threads_do_not_meet():
    model = block()
    merge_linears(model)
    inputs = [activations(2, 3) * scale for scale in (1, 2, 3, 4)]
    with torch.no_grad():
        want = [model(x) for x in inputs]
    wrong = []

    def work(number):
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(model(inputs[number]), want[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("call", ["positional", "keyword", "forward"])
def test_every_way_to_call_the_parent(call):
    model = block()
    x = activations(2, 3)
    with torch.no_grad():
        want = model.self_attn(x, scale=0.5)
        merge_linears(model)
        attn = model.self_attn
        if call == "positional":
            got = attn(x, 0.5)
        elif call == "keyword":
            got = attn(scale=0.5, hidden_states=x)
        else:
            got = attn.forward(x, scale=0.5)
    torch.testing.assert_close(got, want)
    with pytest.raises(TypeError, match="hidden_states"):
        attn()


@pytest.mark.parametrize("config", ["int4-g32-sym", "int8-row", "dense"])
def test_gradients_flow_to_the_input_and_dense_weights(config):
    model = block(config)
    apart = copy.deepcopy(model)
    merge_linears(model)
    xs = []
    for each in (model, apart):
        x = activations(2, 3).requires_grad_()
        each(x).square().sum().backward()
        xs.append(x.grad)
    torch.testing.assert_close(xs[0], xs[1], rtol=1e-4, atol=1e-5)
    if config == "dense":
        want = torch.cat([apart.self_attn.get_submodule(name).weight.grad for name in QKV])
        torch.testing.assert_close(model.self_attn.qkv_proj.weight.grad, want, rtol=1e-4, atol=1e-5)


def test_autocast_casts_as_before():
    model = block()
    x = activations(2, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = model.self_attn(x)
        merge_linears(model)
        got = model.self_attn(x)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("config", ["int4-g32-asym", "dense"])
def test_compiles_into_one_graph(config):
    model = block(config)
    merge_linears(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = activations(2, 3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        x.add_(1)
        torch.testing.assert_close(compiled(x), model(x))
    unmerge_linears(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.gpu
def test_captures_into_a_cuda_graph():
    model = block("int4-g32-sym", torch.bfloat16).cuda()
    merge_linears(model)
    x = activations(1, 1, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        for scale in (1.0, -2.0):
            x.mul_(scale)
            graph.replay()
            torch.testing.assert_close(y, model(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_their_own(how):
    model = block("dense")
    merge_linears(model)
    x = activations(2, 3)
    want = model(x)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        model.self_attn.qkv_proj.weight.zero_()
    assert torch.equal(other(x), want)
    assert isinstance(other.self_attn, Attention)
    unmerge_linears(other)
    assert type(other.self_attn) is Attention
    torch.testing.assert_close(other(x), want)


@pytest.mark.parametrize("config", CONFIGS)
def test_state_dicts_go_in_and_out_under_the_separate_names(config):
    apart, merged = block(config, biases=(True, False, True)).requires_grad_(False), None
    merged = block(config, biases=(True, False, True), seed=7).requires_grad_(False)
    merge_linears(merged)
    assert set(merged.state_dict()) == set(apart.state_dict())
    state = apart.state_dict()
    assert merged.load_state_dict(state) == ([], [])
    assert set(state) == set(apart.state_dict())
    x = activations(2, 3)
    torch.testing.assert_close(merged(x), apart(x))
    again = block(config, biases=(True, False, True), seed=8)
    again.load_state_dict(merged.state_dict())
    assert torch.equal(again(x), apart(x))
    assert_same_bits(entries(merged), entries(apart))


def test_state_dicts_that_do_not_fit_say_why():
    model = block("dense")
    merge_linears(model)
    before = entries(copy.deepcopy(model))
    state = model.state_dict()
    partial = {name: value for name, value in state.items() if "k_proj" not in name}
    with pytest.raises(RuntimeError, match=r"k_proj\.weight, k_proj\.bias is not there"):
        model.load_state_dict(partial, strict=False)
    with pytest.raises(RuntimeError, match=r"v_proj\.weight is \(31, 64\): expected \(32, 64\)"):
        model.load_state_dict(state | {"self_attn.v_proj.weight": torch.zeros(31, 64)})
    with pytest.raises(RuntimeError, match=r"qkv_proj\.weight"):
        model.load_state_dict({name: value for name, value in state.items() if "o_proj" in name or "norm" in name})
    quantized = block("int8-row").state_dict()["self_attn.v_proj.weight"]
    with pytest.raises(RuntimeError, match="differ"):
        model.load_state_dict(state | {"self_attn.v_proj.weight": quantized})
    assert_same_bits(entries(model), before)


@pytest.mark.parametrize("config", ["int4-g32-sym", "q4_0", "dense"])
def test_checkpoints_do_not_know_of_merging(config, tmp_path):
    model = block(config).requires_grad_(False)
    save_pretrained(model, tmp_path / "apart")
    want = entries(copy.deepcopy(model))
    merge_linears(model)
    save_pretrained(model, tmp_path / "merged")
    for folder in ("apart", "merged"):
        fresh = load(tmp_path / folder, Block())
        assert_same_bits(entries(fresh), want)
    with pytest.raises(UnsupportedError, match="self_attn holds merged ones: unmerge_linears"):
        load(tmp_path / "apart", model)


def test_quantizing_after_merging_gives_the_same_codes():
    before, after = block("dense"), block("dense")
    quantize_(before, Int4WeightOnlyConfig(32))
    merge_linears(before)
    merge_linears(after)
    quantize_(after, Int4WeightOnlyConfig(32))
    assert_same_bits(entries(before), entries(after))


def test_moves_and_modes_reach_the_merged_layer():
    model = block("dense")
    merge_linears(model)
    model.to(torch.bfloat16).train()
    assert model.self_attn.qkv_proj.weight.dtype == torch.bfloat16
    assert model(activations(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    unmerge_linears(model)
    assert model.self_attn.q_proj.weight.dtype == torch.bfloat16
    assert model.self_attn.q_proj.training


def test_a_part_alone_refuses_what_is_no_product():
    model = block()
    merge_linears(model)
    with pytest.raises(ShapeError, match="expected the product"):
        model.self_attn.q_proj(activations(2))
    with pytest.raises(AttributeError, match="unmerge_linears restores it"):
        _ = model.self_attn.q_proj.weight
    for name in ("weight", "bias"):  # set, it would be read by nothing
        with pytest.raises(UnsupportedError, match=f"its {name} cannot be set.*unmerge_linears first"):
            setattr(model.self_attn.q_proj, name, torch.zeros(64))
    state = block().state_dict()
    with pytest.raises(UnsupportedError, match="cannot be set"):
        torch.func.functional_call(model, state, (activations(2),))
    assert model.self_attn.q_proj.out_features == 64


def test_merging_twice_changes_nothing():
    model = block()
    assert merge_linears(model) == ["self_attn.qkv_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert merge_linears(model) == []
    unmerge_linears(model)
    assert merge_linears(model) == ["self_attn.qkv_proj"]


def test_a_replaced_merged_layer_saves_itself_and_is_not_cut():
    model = block("dense")
    merge_linears(model)
    x = activations(2, 3)
    want = model(x)
    replace_linear_with_int4(model, 32, lambda module, path: "qkv" in path)
    assert [name for name in model.state_dict() if "qkv" in name or "q_proj" in name] == [
        f"self_attn.qkv_proj.{name}" for name in ("packed", "scales", "bias")
    ]
    torch.testing.assert_close(model(x), want, rtol=0.3, atol=0.3)
    again = copy.deepcopy(model)
    with torch.no_grad():
        again.self_attn.qkv_proj.packed.zero_()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    with pytest.raises(UnsupportedError, match="replaced by a Int4PackedLinear"):
        unmerge_linears(model)


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(64, 2)
        self.up = nn.Linear(2, 128)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def test_an_adapter_around_the_merged_layer_is_saved_with_it():
    model = block("dense")
    merge_linears(model)
    model.self_attn.qkv_proj = Adapter(model.self_attn.qkv_proj)
    state = model.state_dict()
    assert state["self_attn.qkv_proj.base_layer.weight"].shape == (128, 64)
    assert "self_attn.q_proj.weight" not in state
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(activations(2)), model(activations(2)))
    with pytest.raises(UnsupportedError, match="replaced by a Adapter"):
        unmerge_linears(model)


def test_a_parent_that_became_something_else_is_not_taken_apart():
    model = block("dense")
    merge_linears(model)
    model.self_attn.__class__ = type("Sharded", (type(model.self_attn),), {})
    with pytest.raises(UnsupportedError, match="changed to Sharded"):
        unmerge_linears(model)


def test_keep_vars_and_prefixes_reach_the_parts():
    model = block("dense")
    merge_linears(model)
    state = model.state_dict(prefix="a.", keep_vars=True)
    assert state["a.self_attn.k_proj.weight"].grad_fn is not None
    assert model.state_dict()["self_attn.k_proj.weight"].grad_fn is None
    assert set(model.self_attn.state_dict()) == {
        f"{name}.{key}" for name in (*QKV, "o_proj") for key in ("weight", "bias")
    }
    assert set(model.self_attn.qkv_proj.state_dict()) == {"weight", "bias"}


# Refusals. Each changes one thing of a model that would be merged otherwise.


def _hook(model):
    model.self_attn.k_proj.register_forward_hook(lambda *_: None)


def _parameter_hook(model):
    model.self_attn.k_proj.weight.register_hook(lambda grad: grad)


def _tie(model):
    model.head = nn.Linear(64, 64)
    model.head.weight = model.self_attn.q_proj.weight


def _share_memory(model):
    model.head = nn.Linear(64, 64)
    model.head.weight = nn.Parameter(model.self_attn.q_proj.weight.data)


def _same_layer(model):
    model.self_attn.v_proj = model.self_attn.k_proj


def _adapter(model):
    class LoraLinear(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base

        def forward(self, x):
            return self.base_layer(x)

    model.self_attn.v_proj = LoraLinear(model.self_attn.v_proj)


def _parametrized(model):
    nn.utils.parametrizations.orthogonal(model.self_attn.q_proj)


def _gradient(model):
    model(activations(2)).sum().backward()


def _frozen(model):
    model.self_attn.q_proj.requires_grad_(False)


def _missing_bias(model):
    model.self_attn.q_proj.bias = None


def _instance_forward(model):
    model.self_attn.forward = model.self_attn.forward


def _layer_forward(model):
    model.self_attn.q_proj.forward = model.self_attn.q_proj.forward


def _extra(model):
    model.self_attn.q_proj.register_buffer("steps", torch.zeros(1))


def _sibling_missing(model):
    model.self_attn.k_proj = None


def _name_taken(model):
    model.self_attn.qkv_proj = None


def _other_size(model):
    model.self_attn.k_proj = nn.Linear(48, 32)


def _other_dtype(model):
    model.self_attn.k_proj.to(torch.bfloat16)


def _mixed(model):
    quantize_(model, Int8WeightOnlyConfig(), lambda module, path: path.endswith("v_proj"))


def _groups(model):
    quantize_(model, Int4WeightOnlyConfig(32), lambda module, path: path.endswith(("q_proj", "k_proj")))
    quantize_(model, Int4WeightOnlyConfig(16), lambda module, path: path.endswith("v_proj"))


def _per_tensor(model):
    quantize_(model, Int8WeightOnlyConfig("tensor"))


def _as_wide(model):
    model.self_attn.q_proj = nn.Linear(128, 64)
    model.self_attn.k_proj = nn.Linear(128, 32)
    model.self_attn.v_proj = nn.Linear(128, 32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hook, "k_proj has hooks"),
        (_parameter_hook, "k_proj has hooks"),
        (_tie, "a parameter of q_proj is shared"),
        (_share_memory, "a parameter of q_proj is shared"),
        (_same_layer, "shared|two names"),
        (_adapter, "v_proj is a .*LoraLinear, not an nn.Linear"),
        (_parametrized, "q_proj is a .*Parametrized"),
        (_gradient, "q_proj has accumulated gradients"),
        (_frozen, "some of their weights require gradients"),
        (_missing_bias, "some have a bias"),
        (_instance_forward, "its forward was replaced"),
        (_layer_forward, "the forward of q_proj was replaced"),
        (_extra, "q_proj holds more than"),
        (_sibling_missing, "it has no k_proj"),
        (_name_taken, "something called qkv_proj"),
        (_other_size, "64 in features and 48 in features"),
        (_other_dtype, "torch.float32 and torch.bfloat16"),
        (_mixed, "q_proj and v_proj differ: dense and Int8Tensor"),
        (_groups, "q_proj and v_proj differ: .*32.*16"),
        (_per_tensor, "one scale for the whole tensor"),
        (_as_wide, "as wide as its input"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_what_cannot_be_merged_is_left_and_named(change, reason):
    model = block("dense")
    change(model)
    modules = {name: id(module) for name, module in model.named_modules()}
    cls = type(model.self_attn)
    with pytest.warns(UserWarning, match=rf"(?s)left layers apart:.*self_attn: q_proj, k_proj, v_proj: .*({reason})"):
        assert merge_linears(model) == []
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert type(model.self_attn) is cls


class OtherInput(Attention):
    def forward(self, hidden_states, encoder_states):
        return self.q_proj(hidden_states), self.k_proj(encoder_states), self.v_proj(encoder_states)


class Residual(Attention):
    def forward(self, hidden_states):
        return self.q_proj(hidden_states) + hidden_states, self.k_proj(hidden_states), self.v_proj(hidden_states)


class Rebound(Attention):
    def forward(self, hidden_states):
        q = self.q_proj(hidden_states)
        hidden_states = hidden_states * 2
        return q, self.k_proj(hidden_states), self.v_proj(hidden_states)


class Local(Attention):
    def forward(self, x):
        h = x.tanh()
        return self.q_proj(h), self.k_proj(h), self.v_proj(h)


class Width(Attention):
    def forward(self, x):
        return self.q_proj(x) / x.shape[-1], self.k_proj(x), self.v_proj(x)


class DType(Attention):  # x and the product differ in it under autocast
    def forward(self, x):
        return self.q_proj(x).to(x.dtype), self.k_proj(x), self.v_proj(x)


class Twice(Attention):
    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x), self.k_proj(x)


class Context(Attention):
    def forward(self, x):
        with torch.no_grad():
            q = self.q_proj(x)
        return q, self.k_proj(x), self.v_proj(x)


class Weight(Attention):
    def forward(self, x):
        return self.q_proj(x).to(self.q_proj.weight.dtype), self.k_proj(x), self.v_proj(x)


class ReadSize(Attention):
    def forward(self, x):
        batch, _ = x.size()
        return self.q_proj(x) * _, self.k_proj(x), self.v_proj(x), batch


class Caught(Attention):
    def forward(self, x):
        try:
            batch = 1
        except ValueError as x:  # noqa: F841
            batch = 2
        return self.q_proj(x), self.k_proj(x), self.v_proj(x), batch


class Assigned(Attention):
    def forward(self, x):
        self.k_proj = self.q_proj
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class Nested(Attention):
    def forward(self, x):
        return [layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj)]


class Partly(Attention):
    def forward(self, x):
        return self.q_proj(x), self.k_proj(x)


class Decorated(Attention):
    @torch.no_grad()
    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class Shadow(Attention):
    def forward(self, x):
        def half(x):
            return x.device

        return self.q_proj(x), self.k_proj(x), self.v_proj(x), half


class Vars(Attention):
    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x), vars()["x"].sum()


class Locals(Attention):
    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x), locals()["x"].sum()


class Evaluated(Attention):
    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x), eval("x.sum()")


class Executed(Attention):
    def forward(self, x):
        exec("x.mul_(2)")
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class Globals(Attention):
    def forward(self, x):
        globals()["TOKENS"].sum()
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Vars, r"uses vars, which may reach x unseen \(line 2"),
        (Locals, "uses locals"),
        (Evaluated, "uses eval"),
        (Executed, "uses exec"),
        (Globals, "uses globals"),
        (OtherInput, "take different inputs: encoder_states, hidden_states"),
        (Residual, r"uses hidden_states for something else too \(line 2"),
        (Rebound, "uses hidden_states for something else too"),
        (Local, "the input 'h' of .* is not an argument"),
        (Width, r"uses x for something else too \(line 2"),
        (DType, "uses x for something else too"),
        (Twice, "calls k_proj twice"),
        (Context, "q_proj in a loop, under with"),
        (Weight, "q_proj in a loop, under with or try, in a nested function, or not as a call"),
        (Nested, "q_proj in a loop"),
        (ReadSize, "uses x for something else too"),
        (Caught, "gives the name x to something else"),
        (Assigned, "k_proj in a loop|q_proj in a loop"),
        (Partly, "does not call v_proj"),
        (Decorated, "decorator"),
        (Shadow, "has an argument x as well"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_forward_that_does_more_with_its_input_is_refused(cls, reason):
    model = cls()
    with pytest.warns(UserWarning, match=reason):
        assert merge_linears(model) == []
    assert type(model) is cls


class Sizes(Attention):
    def forward(self, x):
        batch, _ = x.size()
        rows, _ = x.shape
        return self.q_proj(x), self.k_proj(x).view(batch, 2, -1), self.v_proj(x).view(rows, -1)


def test_leading_sizes_may_be_read():
    model = Sizes()
    x = activations(5)
    want = model(x)
    assert merge_linears(model) == ["qkv_proj"]
    for got, expected in zip(model(x), want, strict=True):
        torch.testing.assert_close(got, expected)


class Scaled(Attention):
    def forward(self, x):
        q, k = self.q_proj(x), self.k_proj(x)
        q *= 0.5
        return q, k, self.v_proj(x)


class Multiplied(Attention):
    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        k, v = (heads.view(-1, 2, 16) for heads in (k, v))
        return q, k.mul_(v), v


class Direct(Attention):
    def forward(self, x):
        return self.q_proj(x).view(-1, 4, 16).mul_(2), self.k_proj(x), self.v_proj(x)


class Masked(Attention):
    def forward(self, x, mask: bool = True):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        heads = q.view(-1, 4, 16).transpose(0, 1) if mask else k
        heads[0] = 0
        return q, k, v


class Kept(Attention):
    """Autograd keeps k and v for the product, and q is changed before and after."""

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q *= 0.5
        product = k * v
        q.mul_(2).add_(1)
        return q, product, k + v


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("cls", [Scaled, Multiplied, Direct, Masked, Kept])
def test_results_of_projections_may_be_changed_in_place(cls, compiled):
    apart = cls()
    merged = copy.deepcopy(apart)
    assert merge_linears(merged) == ["qkv_proj"]
    run = torch.compile(merged, backend="aot_eager", fullgraph=True) if compiled else merged
    x, y = activations(5).requires_grad_(), activations(5).requires_grad_()
    for want, got in zip(apart(x), run(y), strict=True):
        torch.testing.assert_close(got, want)
        want.square().sum().backward(retain_graph=True)
        got.square().sum().backward(retain_graph=True)
    torch.testing.assert_close(y.grad, x.grad)
    rows = [layer.weight.grad for layer in (apart.q_proj, apart.k_proj, apart.v_proj)]
    torch.testing.assert_close(merged.qkv_proj.weight.grad, torch.cat(rows))
    with torch.no_grad():
        for want, got in zip(apart(x), merged(x), strict=True):
            torch.testing.assert_close(got, want)


class MLP(nn.Module):
    def __init__(self, activation=nn.SiLU):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 96), nn.Linear(64, 96)
        self.down_proj, self.act_fn = nn.Linear(96, 64), activation()

    def forward(self, x):
        """Gated, like those of Hugging Face models."""
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj  # noqa: RET504


class ShortMLP(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class SwappedMLP(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class ResidualMLP(MLP):
    def forward(self, x, scale=1.0):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * scale


@pytest.mark.parametrize(
    "activation", [nn.SiLU, nn.GELU, lambda: nn.SiLU(inplace=True)], ids=["silu", "gelu", "inplace"]
)
@pytest.mark.parametrize("cls", [MLP, ShortMLP, SwappedMLP, ResidualMLP])
def test_gated_mlps_are_the_same_function(cls, activation, monkeypatch):
    fused = []
    monkeypatch.setattr(
        "lq_torch.merge.modules.silu_and_multiply",
        lambda gate, up: fused.append(1) or nn.functional.silu(gate) * up,
    )
    model = cls(activation).requires_grad_(False)
    apart = copy.deepcopy(model)
    assert merge_linears(model) == ["gate_up_proj"]
    x = activations(3, 2)
    for call in (lambda m: m(x), lambda m: m(x=x), lambda m: m.forward(x)):
        torch.testing.assert_close(call(model), call(apart))
    assert len(fused) == (3 if cls in (MLP, ShortMLP) and activation is nn.SiLU else 0)
    with pytest.raises(TypeError, match="'x'"):
        model()
    with pytest.raises(TypeError, match="'y'"):
        model(y=x)


def test_hooks_of_a_gated_mlp_still_run():
    model, seen = MLP(), []
    merge_linears(model)
    for name in ("gate_proj", "up_proj", "act_fn", "down_proj", "gate_up_proj"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    model(activations(2))
    assert sorted(seen) == ["act_fn", "down_proj", "gate_proj", "gate_up_proj", "up_proj"]
    model.act_fn = nn.Tanh()
    want = model.down_proj(
        torch.tanh(model.gate_up_proj(activations(2))[:, :96]) * model.gate_up_proj(activations(2))[:, 96:]
    )
    assert torch.equal(model(activations(2)), want)


def test_a_forward_without_source_is_refused():
    namespace = {"Attention": Attention}
    exec("class Unseen(Attention):\n    def forward(self, x):\n        return self.q_proj(x)", namespace)
    with pytest.warns(UserWarning, match="source of its forward cannot be read"):
        assert merge_linears(namespace["Unseen"]()) == []


def test_refusals_of_one_reason_are_one_line():
    model = nn.ModuleList(Residual() for _ in range(5))
    with pytest.warns(UserWarning, match="\n  0 and 1 and 3 more: q_proj, k_proj, v_proj: its forward uses") as caught:
        assert merge_linears(model) == []
    assert len(caught) == 1


def test_nothing_to_merge_is_said():
    with pytest.warns(UserWarning, match="found no module of Sequential with q_proj, k_proj, v_proj; gate_proj"):
        assert merge_linears(nn.Sequential(nn.Linear(4, 4))) == []


class Explicit(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(16, n) for n in (4, 8, 24))

    def forward(self, *, x):
        return self.third(x), self.first(x) * 1, self.second(x) if x.device.type else None


def test_an_explicit_pattern_merges_any_module():
    model = Explicit()
    x = torch.randn(5, 16)
    want = model(x=x)
    assert merge_linears(model, {"both": ("third", "first", "second")}) == ["both"]
    for got, expected in zip(model(x=x), want, strict=True):
        torch.testing.assert_close(got, expected)


class TwoInputs(Attention):
    def forward(self, x, memory):
        return self.q_proj(x) + self.o_proj(x), self.k_proj(memory), self.v_proj(memory)


def test_one_group_of_a_module_is_merged():
    model = TwoInputs()
    model.v_proj = nn.Linear(64, 48)
    x, memory = activations(2), activations(3)
    want = model(x, memory)
    patterns = {"kv_proj": ("k_proj", "v_proj"), "qo_proj": ("q_proj", "o_proj")}
    with pytest.warns(UserWarning, match="q_proj, o_proj: another group of the same module"):
        assert merge_linears(model, patterns) == ["kv_proj"]
    for got, expected in zip(model(x, memory), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "patterns",
    [
        ["a"],
        {},
        {"a": None},
        {"a": "qkv"},
        {"a": ("q",)},
        {"a": ("q", "q")},
        {"a": ("a", "b")},
        {"a": ("x.y", "z")},
        {"": ("x", "z")},
    ],
    ids=str,
)
def test_patterns_are_checked(patterns):
    with pytest.raises(SpecError, match="pattern"):
        merge_linears(block(), patterns)


def test_what_is_no_module_is_named():
    for task in (merge_linears, unmerge_linears):
        with pytest.raises(SpecError, match=r"expected a torch\.nn\.Module"):
            task(None)


def _language_model(kind, dtype=torch.float32, **changes):
    transformers = pytest.importorskip("transformers")
    options = {
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options, **changes)
    return getattr(transformers, f"{kind}ForCausalLM")._from_config(config, dtype=dtype).eval().requires_grad_(False)


KINDS = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2"]


@pytest.mark.parametrize("config", ["int4-g32-sym", "int8-row", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_models_merge_whole(kind, config, tmp_path):
    model = _language_model(kind)
    if CONFIGS[config] is not None:
        quantize_(model, CONFIGS[config])
    logits = model(TOKENS).logits
    text = model.generate(TOKENS, max_new_tokens=6, do_sample=False)
    want = entries(copy.deepcopy(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = merge_linears(model)
    assert paths == [
        f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.qkv_proj", "mlp.gate_up_proj")
    ]
    torch.testing.assert_close(model(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=6, do_sample=False), text)
    assert_same_bits(entries(model), want)
    save_pretrained(model, tmp_path)
    assert torch.equal(load(tmp_path)(TOKENS).logits, logits)
    unmerge_linears(model)
    assert torch.equal(model(TOKENS).logits, logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attentions_and_hidden_states_are_still_recorded(implementation):
    model = _language_model("Llama", attn_implementation=implementation)
    before = model(TOKENS, output_attentions=implementation == "eager", output_hidden_states=True)
    merge_linears(model)
    after = model(TOKENS, output_attentions=implementation == "eager", output_hidden_states=True)
    assert len(after.hidden_states) == len(before.hidden_states) == 3
    torch.testing.assert_close(after.hidden_states, before.hidden_states, rtol=1e-4, atol=1e-4)
    if implementation == "eager":
        torch.testing.assert_close(after.attentions, before.attentions, rtol=1e-4, atol=1e-4)


def test_transformers_saves_and_loads_a_merged_model(tmp_path):
    model = _language_model("Llama")
    logits = model(TOKENS).logits
    want = entries(copy.deepcopy(model))
    merge_linears(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same_bits(entries(loaded), want)
    assert torch.equal(loaded(TOKENS).logits, logits)


def test_a_merged_mlp_exports():
    mlp = _language_model("Llama").model.layers[0].mlp
    merge_linears(mlp)
    x = activations(3)
    assert torch.equal(torch.export.export(mlp, (x,)).module()(x), mlp(x))


def test_a_merged_language_model_compiles_into_one_graph():
    model = _language_model("Llama")
    quantize_(model, Int4WeightOnlyConfig(32))
    merge_linears(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, model(TOKENS).logits)


def test_lora_around_other_layers_stays(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(_language_model("Llama"), peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    with pytest.warns(UserWarning, match=r"q_proj is a peft\.tuners\.lora"):
        paths = merge_linears(model)
    assert [path.rpartition(".")[2] for path in paths] == ["gate_up_proj"] * 2
