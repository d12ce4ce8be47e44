"""Checkpoints of other libraries: read to the bit, against loops over their words, and written back the same."""

import json

import pytest
import torch
from lq_formats import DTypeError, FormatError, ShapeError, SpecError, UnsupportedError
from lq_formats.interop import CompressedTensorsFormat, HQQFormat, LayerScheme
from lq_formats.layouts import AffineWeight
from lq_torch import (
    GGMLWeightOnlyConfig,
    Int4PermutedTensor,
    Int4Tensor,
    Int4WeightOnlyConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    LowBitTensor,
    export_pretrained,
    import_pretrained,
    load,
    quantize_,
    save_pretrained,
)
from safetensors.torch import load_file, save_file
from torch import nn

FORMATS = ["gptq", "gptq_v2", "awq", "compressed-tensors", "hqq", "auto-round"]


class Net(nn.Module):
    """Tied at both ends, with a bias, as models are; lm_head stays dense."""

    def __init__(self, bias=True):
        super().__init__()
        self.embed = nn.Embedding(24, 64)
        self.up = nn.Linear(64, 32, bias=bias)
        self.down = nn.Linear(32, 64, bias=False)
        self.lm_head = nn.Linear(64, 24, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(64.0), persistent=False)

    def forward(self, tokens):
        return self.lm_head(self.down(self.up(self.embed(tokens) + self.table / 64)))


def make(config=None, dtype=torch.float16, seed=0, bias=True):
    torch.manual_seed(seed)
    model = Net(bias).to(dtype)
    if config is not None:
        quantize_(model, config)
    return model


def rtn(group_size=16, **options):
    return Int4WeightOnlyConfig(group_size, int4_choose_qparams_algorithm="rtn", **options)


def quantized(model):
    return {name: value.data for name, value in model.named_parameters() if isinstance(value.data, LowBitTensor)}


def assert_same_weights(ours, expected):
    ours, expected = quantized(ours), quantized(expected)
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        assert type(ours[name]) is type(weight)
        assert ours[name].spec_json() == weight.spec_json()
        parts = ours[name].to_tensors()
        assert parts.keys() == weight.to_tensors().keys()
        for key, tensor in weight.to_tensors().items():
            assert parts[key].dtype == tensor.dtype
            assert torch.equal(parts[key], tensor)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [16, -1], ids=["g16", "row"])
@pytest.mark.parametrize("shard", [1 << 30, 900], ids=["one-file", "many-files"])
def test_exported_and_imported_is_the_same(name, symmetric, group_size, shard, tmp_path):
    # Integer zeros are 0 in no group of such weights: version 1 of GPTQ holds them as well.
    model = make(rtn(group_size, symmetric=symmetric))
    export_pretrained(model, tmp_path, name, max_shard_bytes=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 if shard > 900 else 4
    back = import_pretrained(tmp_path, make(seed=1))
    assert_same_weights(back, model)
    assert back.lm_head.weight is back.embed.weight
    assert [name for name, value in back.named_parameters() if value.requires_grad] == ["embed.weight", "up.bias"]
    tokens = torch.arange(24)
    assert torch.equal(back(tokens), model(tokens))
    export_pretrained(back, tmp_path / "again", name, max_shard_bytes=shard)
    for file in tmp_path.glob("*.safetensors"):
        again, first = load_file(tmp_path / "again" / file.name), load_file(file)
        assert again.keys() == first.keys()
        assert all(torch.equal(again[key], first[key]) for key in first)
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def word(nibbles):
    """Return the int32 of eight nibbles, the least significant first."""
    value = sum(int(nibble) << (4 * i) for i, nibble in enumerate(nibbles))
    return value - 2**32 if value >= 2**31 else value


def by_hand(method, seed=0):
    """Return tensors and dense weights of Net's two layers as a format documents them, and its configuration."""
    generator = torch.Generator().manual_seed(seed)
    tensors, dense = {}, {}
    for path, n, k in (("up", 32, 64), ("down", 64, 32)):
        size, groups = 16, k // 16
        u = torch.randint(0, 16, (n, k), generator=generator)
        z = torch.randint(1, 16, (n, groups), generator=generator)
        s = (torch.rand(n, groups, generator=generator) / 8 + 0.01).half()
        group = [j // size for j in range(k)]
        if method == "desc_act":
            group = [group[j] for j in torch.randperm(k, generator=generator).tolist()]
        dense[path] = torch.tensor(
            [[(int(u[i, j]) - int(z[i, group[j]])) * float(s[i, group[j]]) for j in range(k)] for i in range(n)],
            dtype=torch.float64,
        )
        if method in ("gptq", "desc_act"):
            layer = {
                "qweight": [[word(u[i, 8 * w : 8 * w + 8]) for i in range(n)] for w in range(k // 8)],
                "qzeros": [[word(z[8 * w : 8 * w + 8, g] - 1) for w in range(n // 8)] for g in range(groups)],
                "g_idx": group,
            }
            layer = {key: torch.tensor(value, dtype=torch.int32) for key, value in layer.items()}
            layer["scales"] = s.t().contiguous()
        elif method == "awq":
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            layer = {
                "qweight": [[word([u[8 * w + o, j] for o in order]) for w in range(n // 8)] for j in range(k)],
                "qzeros": [[word([z[8 * w + o, g] for o in order]) for w in range(n // 8)] for g in range(groups)],
            }
            layer = {key: torch.tensor(value, dtype=torch.int32) for key, value in layer.items()}
            layer["scales"] = s.t().contiguous()
        elif method == "hqq":
            rows = u.reshape(n * groups, size)
            half = n * groups // 2
            layer = {
                "W_q": (rows[:half] * 16 + rows[half:]).to(torch.uint8),
                "scale": s.reshape(-1, 1),
                "zero": z.reshape(-1, 1).half(),
                "shape": torch.tensor([n, k]),
                "nbits": torch.tensor(4, dtype=torch.int32),
                "axis": torch.tensor(1, dtype=torch.int32),
                "packing": torch.tensor([ord(letter) for letter in "4bit_u8"], dtype=torch.uint8),
                "quant_zero": torch.tensor(0, dtype=torch.uint8),
            }
        else:
            signed_zero = (z - 8).to(torch.int8)
            packed_zero = [[word(z[8 * w : 8 * w + 8, g]) for g in range(groups)] for w in range(n // 8)]
            layer = {
                "weight_packed": torch.tensor(
                    [[word(u[i, 8 * w : 8 * w + 8]) for w in range(k // 8)] for i in range(n)], dtype=torch.int32
                ),
                "weight_scale": s,
                "weight_shape": torch.tensor([n, k]),
                "weight_zero_point": signed_zero
                if method == "old zeros"
                else torch.tensor(packed_zero, dtype=torch.int32),
            }
        tensors |= {f"{path}.{key}": value for key, value in layer.items()}
    return tensors, dense


CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False},
    "desc_act": {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "GEMM"},
    "hqq": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "axis": 1}}},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group"}}},
    },
}
CONFIGS["old zeros"] = CONFIGS["compressed-tensors"]


def write(folder, tensors, config, **others):
    model = make()
    rest = {name: value.detach() for name, value in model.state_dict().items() if name in ("embed.weight", "up.bias")}
    save_file({**rest, **tensors}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config, **others}))
    return model


@pytest.mark.parametrize("method", list(CONFIGS))
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["own", "bf16"])
def test_documented_words_are_read(method, dtype, tmp_path):
    tensors, dense = by_hand(method)
    model = write(tmp_path, tensors, CONFIGS[method])
    loaded = import_pretrained(tmp_path, make(seed=1), dtype=dtype)
    for path, expected in dense.items():
        weight = getattr(loaded, path).weight.data
        assert type(weight) is (Int4PermutedTensor if method == "desc_act" else Int4Tensor)
        assert weight.dtype == (dtype or torch.float16)
        assert weight.scale.dtype == torch.float16
        # A product of a code of 5 bits and a scale of 11 is exact in float32.
        assert torch.equal(weight.dequantize(torch.float32).double(), expected)
        x = torch.randn(5, expected.shape[1], dtype=torch.float64).to(weight.dtype)
        y = nn.functional.linear(x, weight).double()
        bound = x.double().abs() @ expected.abs().t() * 2 * torch.finfo(weight.dtype).eps
        assert bool(((y - x.double() @ expected.t()).abs() <= bound).all())
    torch.testing.assert_close(loaded.up.bias, model.up.bias.to(dtype or torch.float16))


def test_desc_act_is_saved_loaded_moved_and_exported(tmp_path):
    tensors, dense = by_hand("desc_act")
    write(tmp_path, tensors, CONFIGS["desc_act"])
    model = import_pretrained(tmp_path, make(seed=1))
    save_pretrained(model, tmp_path / "lq")
    assert_same_weights(load(tmp_path / "lq", make(seed=2)), model)
    assert_same_weights(model.to(torch.float16), model)
    for name in ("gptq", "compressed-tensors"):
        export_pretrained(model, tmp_path / name, name)
        assert_same_weights(import_pretrained(tmp_path / name, make(seed=3)), model)
    exported = load_file(tmp_path / "gptq" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in tensors.items())
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert (config["desc_act"], config["sym"], config["bits"]) == (True, False, 4)
    for name in ("awq", "hqq", "auto-round"):
        with pytest.raises(UnsupportedError, match=r"up: .* no g_idx"):
            export_pretrained(model, tmp_path / name, name)
    x = torch.randn(3, 64, dtype=torch.float16, requires_grad=True)
    nn.functional.linear(x, model.up.weight).sum().backward()
    torch.testing.assert_close(x.grad.double(), dense["up"].sum(0).expand(3, -1), rtol=1e-2, atol=1e-2)


def test_an_order_from_a_file_is_not_trusted(tmp_path):
    tensors, _ = by_hand("desc_act")
    write(tmp_path, tensors, CONFIGS["desc_act"])
    save_pretrained(import_pretrained(tmp_path, make()), tmp_path / "lq")
    (file,) = (tmp_path / "lq").glob("*.safetensors")
    stored = load_file(file)
    stored["up.weight:order"][3] = 1 << 20
    save_file(stored, file, metadata={"format": "pt", "lq_format_version": "2"})
    with pytest.raises(FormatError, match="not a permutation"):
        load(tmp_path / "lq", make())


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths_are_read(bits, tmp_path):
    from lq_formats.layouts import GPTQ, AffineWeight

    codes = torch.randint(0, 2**bits, (32, 64), dtype=torch.uint8)
    weight = AffineWeight(codes, torch.rand(32, 4).half() + 0.1, torch.full((32, 4), 1, dtype=torch.uint8), bits)
    tensors, _ = by_hand("gptq")
    tensors |= {f"up.{key}": value for key, value in GPTQ.pack(weight).items()}
    write(tmp_path, tensors, {**CONFIGS["gptq"], "dynamic": {"+:up": {"bits": bits}}})
    model = import_pretrained(tmp_path, make())
    assert model.up.weight.data.kind == "intx"
    assert torch.equal(model.up.weight.data.dequantize(torch.float32), weight.dequantize())
    for name in ("gptq_v2", "auto-round"):
        export_pretrained(model, tmp_path / name, name)
        assert_same_weights(import_pretrained(tmp_path / name, make(seed=1)), model)
    with pytest.raises(UnsupportedError, match="4 bits only"):
        export_pretrained(model, tmp_path / "awq", "awq")


def test_int8_rows_are_exchanged(tmp_path):
    model = make()
    quantize_(model, Int8WeightOnlyConfig(), lambda module, path: path == "down")
    quantize_(model, rtn(scale_dtype=torch.float32), lambda module, path: path == "up")
    export_pretrained(model, tmp_path, "compressed-tensors")
    groups = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(group["weights"]["num_bits"] for group in groups.values()) == [4, 8]
    back = import_pretrained(tmp_path, make(seed=1))
    assert type(back.down.weight.data) is Int8Tensor
    assert_same_weights(back, model)


def test_searched_weights_are_exchanged_where_zeros_allow(tmp_path):
    symmetric = make(Int4WeightOnlyConfig(16))
    assert bool((quantized(symmetric)["up.weight"].scale < 0).any())
    export_pretrained(symmetric, tmp_path / "gptq", "gptq")
    assert_same_weights(import_pretrained(tmp_path / "gptq", make(seed=1)), symmetric)
    model = make(Int4WeightOnlyConfig(16, symmetric=False))
    export_pretrained(model, tmp_path / "hqq", "hqq")
    assert_same_weights(import_pretrained(tmp_path / "hqq", make(seed=1)), model)
    with pytest.raises(UnsupportedError, match=r"up: gptq stores integer zeros"):
        export_pretrained(model, tmp_path / "no", "gptq")
    assert not (tmp_path / "no" / "config.json").exists()


def damaged(folder, change, method="gptq"):
    tensors, _ = by_hand(method)
    config = dict(CONFIGS[method])
    change(tensors, config)
    write(folder, tensors, config)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t, c: t.pop("up.scales"), FormatError, "up: gptq layer has no tensor 'scales'"),
        (
            lambda t, c: t.pop("down.qweight"),
            FormatError,
            r"lacks 1 tensors of the model, among them \['down.weight'\]",
        ),
        (lambda t, c: t.update({"x.y": torch.zeros(1)}), FormatError, r"1 tensors that the model lacks.*x.y"),
        (lambda t, c: t.update({"up.qweight": t["up.qweight"][:4]}), ShapeError, "up: gptq tensor 'qweight' has shape"),
        (lambda t, c: t.update({"up.qzeros": t["up.qzeros"][:, :1].contiguous()}), SpecError, "up: bits=1"),
        (lambda t, c: t["up.g_idx"].fill_(99), FormatError, "up: gptq g_idx holds groups 99"),
        (lambda t, c: t["up.g_idx"].fill_(0), FormatError, "up: g_idx puts"),
        (lambda t, c: t.update({"up.qweight": t["up.qweight"].float()}), DTypeError, "up: gptq tensor 'qweight'"),
        (
            lambda t, c: t.update({"down.bias": torch.ones(64).half()}),
            FormatError,
            "'down.bias', and the model's layer",
        ),
        (lambda t, c: t.update({"embed.weight": torch.ones(3, 3)}), ShapeError, "embed.weight has shape"),
        (lambda t, c: t.update({"up.bias": torch.ones(32).int()}), FormatError, "up.bias is I32"),
        (lambda t, c: t.update({"no.qweight": torch.ones(8, 8)}), FormatError, "the quantized layer 'no'"),
        (lambda t, c: c.update(sym=True), FormatError, "gptq layer claims to be symmetric"),
        (lambda t, c: c.update(checkpoint_format="marlin"), UnsupportedError, "'marlin'"),
        (lambda t, c: c.update(checkpoint_format=["a"]), UnsupportedError, "expected gptq or gptq_v2"),
        (lambda t, c: c.update(quant_method="bitsandbytes"), UnsupportedError, "'bitsandbytes'"),
        (lambda t, c: c.update(bits="4"), FormatError, "bits='4'"),
    ],
)
def test_damage_is_named_and_the_model_is_as_it_was(change, error, message, tmp_path):
    damaged(tmp_path, change)
    model = make(seed=1)
    with pytest.raises(error, match=message):
        import_pretrained(tmp_path, model)
    if "claims" not in message and "g_idx" not in message and error is not DTypeError:
        untouched = make(seed=1)
        for name, value in model.state_dict().items():
            assert torch.equal(value, untouched.state_dict()[name])


def test_zero_biases_of_old_writers_are_accepted(tmp_path):
    damaged(tmp_path, lambda t, c: t.update({"down.bias": torch.zeros(64).half()}))
    assert import_pretrained(tmp_path, make()).down.bias is None


def test_folders_that_are_none_are_named(tmp_path):
    for missing in ("nothing", "x" * 300):
        with pytest.raises(FileNotFoundError, match=r"is not a folder with a config.json"):
            import_pretrained(tmp_path / missing)
        with pytest.raises(FileNotFoundError, match=r"is not a folder with an lq.json"):
            load(tmp_path / missing)
    with pytest.raises(FormatError, match="says nothing of quantization"):
        import_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": [1]}')
    with pytest.raises(FormatError, match="is a list, not a map"):
        import_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match="not JSON"):
        import_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": CONFIGS["gptq"]}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FormatError, match="no pickles"):
        import_pretrained(tmp_path)
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="no quantized layer"):
        import_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a.weight": "../model.safetensors"}}')
    with pytest.raises(FormatError, match="in the same folder"):
        import_pretrained(tmp_path)
    save_pretrained(make(rtn()), tmp_path / "lq")
    with pytest.raises(FormatError, match=r"lq_torch.load reads it"):
        import_pretrained(tmp_path / "lq")
    with pytest.raises(FormatError, match=r"import_pretrained"):
        load(tmp_path)


def test_old_configurations_are_read(tmp_path):
    for method, name, config in (
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 16, "sym": False, "damp_percent": 0.01}),
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 16, "zero_point": True, "version": "GEMM"}),
    ):
        folder = tmp_path / method
        folder.mkdir()
        tensors, dense = by_hand(method)
        write(folder, tensors, CONFIGS[method])
        (folder / "config.json").unlink()
        (folder / name).write_text(json.dumps(config))
        model = import_pretrained(folder, make())
        assert torch.equal(model.up.weight.data.dequantize(torch.float32).double(), dense["up"])


def test_what_cannot_be_exported_is_named(tmp_path):
    with pytest.raises(SpecError, match="'gguf'"):
        export_pretrained(make(rtn()), tmp_path, "gguf")
    with pytest.raises(SpecError, match="expected one of auto-round, awq"):
        export_pretrained(make(rtn()), tmp_path, ["gptq"])
    with pytest.raises(UnsupportedError, match="no quantized layer"):
        export_pretrained(make(), tmp_path)
    with pytest.raises(UnsupportedError, match=r"up: a GGMLTensor"):
        export_pretrained(make(GGMLWeightOnlyConfig()), tmp_path)
    with pytest.raises(DTypeError, match=r"up: gptq stores float16"):
        export_pretrained(make(rtn(scale_dtype=torch.float32)), tmp_path)
    model = make(rtn(symmetric=False))
    quantized(model)["up.weight"].zero[0, 0] = 0
    with pytest.raises(UnsupportedError, match="export it as gptq_v2"):
        export_pretrained(model, tmp_path)
    mixed = make()
    quantize_(mixed, rtn(16), lambda module, path: path == "up")
    quantize_(mixed, rtn(32), lambda module, path: path == "down")
    for name in ("awq", "hqq"):
        with pytest.raises(UnsupportedError, match="one scheme for all layers"):
            export_pretrained(mixed, tmp_path / name, name)


def test_a_hugging_face_model_is_built(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    quantize_(model, rtn(32, symmetric=False))
    tokens = torch.arange(12)[None]
    for name in FORMATS[1:]:
        export_pretrained(model, tmp_path / name, name)
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert written["architectures"] == ["LlamaForCausalLM"]
        assert written["quantization_config"]["quant_method"] in name
        back = import_pretrained(tmp_path / name)
        assert not back.training
        assert not hasattr(back.config, "quantization_config")
        assert back.lm_head.weight.dtype == torch.bfloat16
        assert torch.equal(back(tokens).logits, model(tokens).logits)
    export_pretrained(model, tmp_path / "mixed", "gptq_v2")
    rules = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization_config"]
    assert "dynamic" not in rules  # lm_head is dense everywhere


@pytest.mark.gpu
def test_layers_are_converted_on_the_gpu(tmp_path):
    for method in ("desc_act", "awq", "hqq", "compressed-tensors"):
        folder = tmp_path / method
        folder.mkdir()
        tensors, dense = by_hand(method)
        write(folder, tensors, CONFIGS[method])
        model = import_pretrained(folder, make(), device="cuda")
        assert all(value.is_cuda for value in model.state_dict().values())
        for path, expected in dense.items():
            weight = getattr(model, path).weight.data
            assert torch.equal(weight.dequantize(torch.float32).double().cpu(), expected)
            x = torch.randn(5, expected.shape[1], dtype=torch.float16, device="cuda")
            y = nn.functional.linear(x, weight).double().cpu()
            reference = x.double().cpu() @ expected.t()
            assert float((y - reference).norm() / reference.norm()) < 2e-3


@pytest.mark.parametrize("name", ["gptq_v2", "compressed-tensors"])
def test_every_packing_is_exported_as_the_same_bits(name, tmp_path):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(128, 64, bias=False)).bfloat16()
    files = {}
    for packing in ("plain", "preshuffled", "tile_packed_to_4d", "gemlite"):
        model = nn.Sequential(nn.Linear(128, 64, bias=False)).bfloat16()
        model.load_state_dict(dense.state_dict())
        quantize_(model, rtn(32, int4_packing_format=packing), lambda module, path: True)
        export_pretrained(model, tmp_path / packing, name)
        files[packing] = load_file(tmp_path / packing / "model.safetensors")
    plain = files.pop("plain")
    for packing, tensors in files.items():
        assert tensors.keys() == plain.keys()
        for key, tensor in plain.items():
            # gemlite's scales are float16 whatever the weight is.
            assert torch.equal(tensors[key], tensor) or ("scale" in key and packing == "gemlite")


def test_layers_of_few_out_features_come_back(tmp_path):
    """Zeros of eight rows are one word, and a tensor of a file has other strides than one that was packed here."""
    torch.manual_seed(0)
    model, again = (nn.Sequential(nn.Linear(64, 8, bias=False)) for _ in range(2))
    config = Int4WeightOnlyConfig(
        group_size=32, symmetric=False, int4_choose_qparams_algorithm="rtn", scale_dtype=torch.float16
    )
    quantize_(model, config, lambda module, path: True)
    export_pretrained(model, tmp_path, "compressed-tensors")
    import_pretrained(tmp_path, again)
    x = torch.randn(3, 64)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_of_few_in_features_have_the_bits_that_the_configuration_says(bits):
    """Four codes of 4 bits or of 8 take one word."""
    codes = torch.randint(1 << bits, (8, 4), dtype=torch.uint8)
    weight = AffineWeight(codes, torch.ones(8, 1, dtype=torch.float16), None, bits)
    tensors = CompressedTensorsFormat().pack(weight)
    config = CONFIGS["compressed-tensors"]
    said = {"config_groups": {"group_0": {"weights": {"num_bits": bits, "strategy": "channel"}}}}
    form = CompressedTensorsFormat.from_config({**config, **said})
    assert torch.equal(form.unpack(tensors).codes, codes)
    groups = {f"group_{n}": {"weights": {"num_bits": n, "strategy": "channel"}} for n in (4, 8)}
    with pytest.raises(UnsupportedError, match="4 in features among layers of 4 and of 8 bits"):
        CompressedTensorsFormat.from_config({**config, "config_groups": groups}).unpack(tensors)


def test_hqq_layers_without_scales_are_refused():
    with pytest.raises(UnsupportedError, match="0 scales"):
        HQQFormat().check_shapes(8, 64, {"W_q": (4, 64), "scale": (0, 1), "zero": (0, 1)})


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        (torch.tensor([8.0, torch.inf]), DTypeError, "'weight_shape' has dtype torch.float32: expected int64 or int32"),
        (torch.tensor([8j, 64j]), DTypeError, "'weight_shape' has dtype torch.complex64"),
        (torch.tensor([[8, 64]]), ShapeError, r"'weight_shape' has shape \(1, 2\): expected 1 dimensions"),
        (torch.tensor([8, 64, 1]), FormatError, r"weight_shape holds \[8, 64, 1\]"),
        (torch.tensor([8, -64]), FormatError, "'weight_packed' has 8 words a row"),
    ],
    ids=["infinity", "complex", "matrix", "three", "negative"],
)
def test_sizes_of_compressed_tensors_that_are_none_are_named(shape, error, message):
    tensors = {
        "weight_packed": torch.zeros(8, 8, dtype=torch.int32),
        "weight_scale": torch.ones(8, 1, dtype=torch.float16),
    }
    with pytest.raises(error, match=message):
        CompressedTensorsFormat().unpack({**tensors, "weight_shape": shape})
    with pytest.raises(FormatError, match="has no tensor 'weight_shape'"):
        CompressedTensorsFormat().unpack(tensors)


@pytest.mark.parametrize("bits", [4, 8])
def test_old_zeros_beyond_their_bits_are_refused(bits):
    codes = torch.randint(1 << bits, (8, 64), dtype=torch.uint8)
    tensors = CompressedTensorsFormat().pack(AffineWeight(codes, torch.ones(8, 2, dtype=torch.float16), None, bits))
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    zero = torch.tensor([[low, high]] * 8, dtype=torch.int8)
    found = CompressedTensorsFormat().unpack({**tensors, "weight_zero_point": zero})
    assert found.zero[0].tolist() == [0, (1 << bits) - 1]
    for wrong in (low - 1, high + 1):
        if -128 <= wrong < 128:  # of 8 bits an int8 holds no other
            zero[3, 1] = wrong
            with pytest.raises(FormatError, match=f"'weight_zero_point' holds .*{wrong}.*: not {bits} bits"):
                CompressedTensorsFormat().unpack({**tensors, "weight_zero_point": zero})


@pytest.mark.parametrize(("most", "few"), [(4, 8), (8, 4)])
def test_the_commonest_scheme_is_what_a_configuration_says_first(most, few):
    schemes = {path: LayerScheme(few if path == "b" else most, 32, True) for path in "abc"}
    groups = CompressedTensorsFormat().to_config(schemes, [])["config_groups"]
    found = [(group["targets"], group["weights"]["num_bits"]) for group in groups.values()]
    assert found == [(["Linear"], most), (["b"], few)]
