"""Adapters around quantized weights under DistributedDataParallel and fully_shard, as docs/quantize.md says; one process."""

import copy
import re
from pathlib import Path

import pytest
import torch
from lq_formats import UnsupportedError
from lq_torch import GGMLWeightOnlyConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig, LowBitTensor, quantize_
from torch import distributed, nn

DOCS = Path(__file__).parents[3] / "docs" / "quantize.md"
CONFIGS = {
    "int4": Int4WeightOnlyConfig(32),
    "preshuffled": Int4WeightOnlyConfig(32, int4_packing_format="preshuffled"),
    "int8": Int8WeightOnlyConfig(),
    "q4_0": GGMLWeightOnlyConfig(),
}
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(64, 64)
        self.down = nn.Linear(64, 4, bias=False)
        self.up = nn.Linear(4, 64, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    distributed.init_process_group("gloo", init_method=store.as_uri(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request):
    torch.manual_seed(0)
    model = Adapted()
    quantize_(model, request.param, lambda _, path: path == "base")
    return model


def run_block(word, **names):
    """Run the code block of the documentation that holds a word."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    (block,) = [block for block in blocks if word in block]
    exec(compile(block, str(DOCS), "exec"), names)
    return names


def whole(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def assert_trains(wrapped, model, reference):
    reference(X).square().sum().backward()
    wrapped(X).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert expected.pop("base.weight") is None
    assert len(expected) == 3
    for name, gradient in expected.items():
        torch.testing.assert_close(whole(model.get_parameter(name).grad), gradient)
    assert isinstance(model.base.weight.data, LowBitTensor)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.01)
    optimizer.step()
    assert not torch.equal(wrapped(X), reference(X))


def test_data_parallel_trains_adapters_around_weights_that_it_ignores(model):
    reference = copy.deepcopy(model)
    names = run_block("DistributedDataParallel", model=model)
    assert type(names["parallel"]).__name__ == "DistributedDataParallel"
    assert_trains(names["parallel"], model, reference)


def test_sharded_adapters_train_around_weights_that_are_ignored(model):
    reference = copy.deepcopy(model)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    run_block("fully_shard", model=model, mesh=mesh)
    assert type(model.up.weight).__name__ == "DTensor"
    assert_trains(model, model, reference)


def test_without_that_both_refuse(model):
    with pytest.raises(UnsupportedError, match="not defined for a quantized weight"):
        nn.parallel.DistributedDataParallel(model)
    with pytest.raises(UnsupportedError, match="not defined for a quantized weight"):
        distributed.fsdp.fully_shard(model, mesh=distributed.device_mesh.init_device_mesh("cpu", (1,)))
