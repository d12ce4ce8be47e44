"""Layers on a GPU that is not the current one, and on two at once: the same bits as on the first."""

import threading

import pytest
import torch
from lq_formats import LQError
from lq_torch import (
    GGMLWeightOnlyConfig,
    Int4DynamicActivationConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationConfig,
    Int8WeightOnlyConfig,
    quantize_,
    warmup,
)
from torch import nn

pytestmark = pytest.mark.multi_gpu
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
CONFIGS = {
    "int4": Int4WeightOnlyConfig(group_size=128),
    "int4-g32-asym": Int4WeightOnlyConfig(group_size=32, symmetric=False),
    "int4-preshuffled": Int4WeightOnlyConfig(group_size=128, int4_packing_format="preshuffled"),
    "int8": Int8WeightOnlyConfig(),
    "w4a8": Int4DynamicActivationConfig(activation="fp8"),
    "w8a8": Int8DynamicActivationConfig(activation="int8"),
    "q4_0": GGMLWeightOnlyConfig("q4_0"),
    "q6_k": GGMLWeightOnlyConfig("q6_k"),
}
TOKENS = (1, 5, 16, 40, 200, 600)


def layer(config, device, n=512, k=1024):
    """Return a layer of given weights, quantized on the device."""
    generator = torch.Generator().manual_seed(n + k)
    made = nn.Linear(k, n, bias=True, dtype=torch.bfloat16)
    with torch.no_grad():
        made.weight.copy_(torch.randn(n, k, generator=generator) / k**0.5)
        made.bias.copy_(torch.randn(n, generator=generator))
    model = nn.Sequential(made.to(device))
    quantize_(model, config)
    return model[0]


def tokens(m, device, k=1024):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(device, torch.bfloat16)


@pytest.fixture(autouse=True)
def first_is_current():
    """Whoever calls has the first GPU as its current one, and keeps it."""
    with torch.cuda.device(FIRST), torch.no_grad():
        yield
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_layer_on_another_gpu_has_the_same_bits(config):
    here, there = layer(config, FIRST), layer(config, SECOND)
    for m in TOKENS:
        y = there(tokens(m, SECOND))
        assert y.device == SECOND
        assert torch.equal(y.to(FIRST), here(tokens(m, FIRST))), m


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_layer_that_moves_has_the_same_bits(config):
    made = layer(config, FIRST)
    before = [made(tokens(m, FIRST)) for m in TOKENS]
    made.to(SECOND)
    for m, y in zip(TOKENS, before, strict=True):
        assert torch.equal(made(tokens(m, SECOND)).to(FIRST), y)


def test_a_model_on_two_gpus_warms_up_and_runs():
    model = nn.ModuleList(
        [layer(CONFIGS["int4"], FIRST), layer(CONFIGS["int8"], SECOND), layer(CONFIGS["int4"], SECOND)]
    )
    assert warmup(model, (1, 64)) > 0
    for each, device in zip(model, (FIRST, SECOND, SECOND), strict=True):
        assert each(tokens(7, device)).isfinite().all()


def test_threads_run_a_gpu_each():
    layers = {device: layer(CONFIGS["int4"], device) for device in (FIRST, SECOND)}
    expected = {m: layers[FIRST](tokens(m, FIRST)).cpu() for m in TOKENS}
    wrong, together = [], threading.Barrier(2, timeout=60)

    def run(device):
        with torch.no_grad():
            together.wait()
            for _ in range(50):
                for m, y in expected.items():
                    if not torch.equal(layers[device](tokens(m, device)).cpu(), y):
                        wrong.append((device, m))

    threads = [threading.Thread(target=run, args=(device,)) for device in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_graph_is_captured_on_another_gpu():
    made, x = layer(CONFIGS["int4"], SECOND), tokens(16, SECOND)
    expected = made(x)
    with torch.cuda.device(SECOND):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = made(x)
        x.copy_(tokens(16, SECOND) * 2)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, made(x))
        assert not torch.equal(y, expected)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tokens_on_another_gpu_are_an_error_that_names_both(config):
    made = layer(config, SECOND)
    with pytest.raises(LQError, match=r"cuda:0(.|\n)*cuda:1|cuda:1(.|\n)*cuda:0"):
        made(tokens(3, FIRST))
