"""Derived packings: made once a weight, found through any view of it, renewed after a change, freed with it."""

import gc

import torch
from lq_formats import quantize_i4_pack8
from lq_kernels import matmul_bf16_i4
from lq_kernels.derived import _cache, derived


class Counter:
    """Counts how often a derived tensor is made."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        def make() -> torch.Tensor:
            self.made += 1
            return weight.clone() + 1

        return derived(weight, "test", make)


def test_is_made_once_a_weight_and_found_through_temporary_views():
    count, weight = Counter(), torch.zeros(4, 8, dtype=torch.int8)
    first = count(weight)
    assert count(weight) is first
    assert count(weight.detach()) is first
    assert count.made == 1
    words = count(weight.view(torch.int32))
    assert words.dtype == torch.int32
    assert count(weight.view(torch.int32)) is words
    assert count.made == 2


def test_other_slices_of_a_storage_are_other_weights():
    count, weight = Counter(), torch.arange(8)
    assert torch.equal(count(weight[:4]), torch.arange(1, 5))
    assert torch.equal(count(weight[4:]), torch.arange(5, 9))
    assert torch.equal(count(weight[::2]), torch.arange(1, 9, 2))


def test_an_in_place_change_and_replaced_data_are_noticed():
    count, weight = Counter(), torch.zeros(8)
    count(weight)
    weight.fill_(5)
    assert torch.equal(count(weight), torch.full((8,), 6.0))
    weight.data = torch.full((8,), 9.0)
    assert torch.equal(count(weight), torch.full((8,), 10.0))


def test_a_change_while_it_is_made_is_noticed():
    """As of another thread, after the weight was read: what was made is of the weight before."""
    for mode in (torch.inference_mode(False), torch.inference_mode()):
        with mode:
            weight = torch.zeros(8)

            def make(weight=weight):
                made = weight.clone()
                weight.fill_(5)
                return made

            assert torch.equal(derived(weight, "test", make), torch.zeros(8))
            assert torch.equal(derived(weight, "test", make), torch.full((8,), 5.0))


def test_changes_in_inference_mode_are_noticed():
    count = Counter()
    with torch.inference_mode():
        weight = torch.zeros(8)
        first = count(weight)
        assert count(weight) is first
        weight.fill_(5)
        assert torch.equal(count(weight), torch.full((8,), 6.0))


def test_is_freed_with_the_weight():
    gc.collect()
    before = len(_cache)
    weight = torch.zeros(8)
    Counter()(weight)
    view = weight[:4]
    del weight
    gc.collect()
    assert len(_cache) == before + 1
    del view
    gc.collect()
    assert len(_cache) == before


def test_an_int8_packing_is_repacked_for_aten_only_once(monkeypatch):
    from lq_kernels import aten_cpu

    made = []
    unpack = aten_cpu.unpack_int4
    monkeypatch.setattr(aten_cpu, "unpack_int4", lambda *args: made.append(1) or unpack(*args))
    packed, scales = quantize_i4_pack8(torch.randn(32, 256), 128, torch.int8)
    x = torch.randn(1, 256)
    for _ in range(3):
        matmul_bf16_i4(x, packed, scales, 128, kernel="aten-cpu")
    assert len(made) == 1
