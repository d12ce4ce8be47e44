import sys
from types import ModuleType

import pytest
import torch
from lq_eval.bench.peers import PEERS, gemlite_config, humming_configs, peer_calls
from lq_eval.bench.products import DYNAMIC_OPS, Product
from lq_eval.bench.shapes import Shape
from lq_formats import DeviceError, MissingPackageError, UnsupportedError

SHAPE = Shape("64x256", 64, 256)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("op", "group", "weight", "activation"),
    [
        ("int4", 128, {"dtype": "int4", "group_size": 128}, None),
        ("int4", -1, {"dtype": "int4"}, None),
        ("int8", 128, {"dtype": "int8"}, None),
        ("w4a8-fp8", 128, {"dtype": "int4", "group_size": 128}, {"dtype": "float8e4m3"}),
        ("w4a8-int8", 128, {"dtype": "int4", "group_size": 128}, {"dtype": "int8"}),
        ("w8a8-int8", 128, {"dtype": "int8"}, {"dtype": "int8"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hummings_description_of_a_product(op, group, weight, activation):
    assert humming_configs(Product(op, group)) == (weight, activation)


@pytest.mark.parametrize(
    ("op", "weight", "activation", "group"),
    [
        ("int4", "int4", "none", 64),
        ("int8", "int8", "none", -1),
        ("w4a8-fp8", "int4", "fp8", None),
        ("w8a8-int8", "int8", "int8", None),
        ("w8a8-fp8", "fp8", "fp8", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gemlites_configuration_of_a_product(op, weight, activation, group):
    config = gemlite_config(Product(op, 64))
    assert (config.weight, config.activation, config.group_size) == (weight, activation, group)


def test_what_a_peer_does_not_have_is_refused():
    with pytest.raises(UnsupportedError, match="not for int8"):
        peer_calls("tinygemm", Product("int8"), SHAPE, torch.bfloat16, CUDA, 1)


@pytest.mark.parametrize("peer", PEERS)
def test_peers_need_a_gpu(peer):
    with pytest.raises(DeviceError, match="CUDA GPU"):
        peer_calls(peer, Product("int4"), SHAPE, torch.bfloat16, CPU, 1)


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "humming.layer", None)
    with pytest.raises(MissingPackageError, match="humming-kernels"):
        peer_calls("humming", Product("int4"), SHAPE, torch.bfloat16, CUDA, 1)


@pytest.mark.parametrize("op", ["int4", "w8a8-int8"])
def test_humming_is_prepared_copy_by_copy(monkeypatch, op):
    """A stand-in for humming's layer, on the CPU: what it is given, and that every copy is called."""
    made = []

    class HummingLayer(torch.nn.Module):
        def __init__(self, shape_n, shape_k, weight_config, input_config, torch_dtype):
            super().__init__()
            self.seen = [(shape_n, shape_k), weight_config["dtype"], input_config, torch_dtype]
            made.append(self)

        def load_from_unquantized(self, weight):
            self.seen.append(tuple(weight.shape))

        def transform(self):
            self.seen.append("transformed")

        def forward(self, x):
            self.seen.append(tuple(x.shape))

    module = ModuleType("humming.layer")
    module.HummingLayer = HummingLayer
    monkeypatch.setitem(sys.modules, "humming.layer", module)
    product = Product(op)
    calls = PEERS["humming"].prepare(product, SHAPE, torch.float32, CPU, 3 * 64 * 256)(torch.randn(5, 256))
    for call in calls:
        call()
    activation = None if op == "int4" else {"dtype": "int8"}
    dtype = "int4" if op == "int4" else "int8"
    assert len(made) == len(calls) == (6 if op == "int4" else 3)
    for layer in made:
        assert layer.seen == [(64, 256), dtype, activation, torch.float32, (64, 256), "transformed", (5, 256)]


def test_dynamic_products_say_which_configuration_is_missing(monkeypatch):
    monkeypatch.delattr("lq_torch.Int4DynamicActivationConfig", raising=False)
    monkeypatch.delattr("lq_torch.Int8DynamicActivationConfig", raising=False)
    for op in DYNAMIC_OPS:
        with pytest.raises(UnsupportedError, match="DynamicActivationConfig"):
            Product(op, 64).operand(SHAPE, torch.float32, CPU, 1)
