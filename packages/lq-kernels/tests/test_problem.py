"""Problem and Arch: hashable values that selection can be cached on."""

import pytest
import torch
from lq_formats import QuantSpec, ShapeError
from lq_kernels import Arch, Problem


def test_problems_are_values():
    def make():
        return Problem("int4", 3, 64, 256, QuantSpec(4, "group", 32, False), torch.float16, Arch("cpu"))

    assert make() == make()
    assert len({make(), make()}) == 1
    assert make().group_size == 32
    assert str(make()) == "int4 m=3 n=64 k=256 g=32 asym float16 on cpu"


@pytest.mark.parametrize("sizes", [(0, 64, 256), (3, 0, 256), (3, 64, -1)])
def test_an_empty_product_is_no_problem(sizes):
    with pytest.raises(ShapeError, match="expected at least 1 each"):
        Problem("int8", *sizes, QuantSpec(8, "row"), torch.float16, Arch("cpu"))


def test_a_row_is_one_group():
    problem = Problem("int4", 1, 8, 13, QuantSpec(4, "row"), torch.float32, Arch("cpu"))
    assert problem.group_size == 13


def test_cpu_arch():
    assert Arch.of("cpu") == Arch.of(torch.device("cpu")) == Arch("cpu")


@pytest.mark.gpu
def test_gpu_arch():
    arch = Arch.of("cuda")
    assert arch is Arch.of(torch.device("cuda", torch.cuda.current_device()))
    assert arch.kind in ("cuda", "rocm")
    assert arch.sm_count > 0
    assert arch.name == torch.cuda.get_device_name()
