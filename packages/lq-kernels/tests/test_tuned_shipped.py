"""The tables that ship: for which GPUs, and that they are fresh and hold nothing but the kernels' own cuts."""

from pathlib import Path

import pytest
from lq_kernels.tuned import lookup, table
from lq_kernels.tuned.kernels import config_of
from lq_kernels.tuned.lookup import source_digests
from lq_kernels.tuned.table import read

SHIPPED = sorted(lookup.SHIPPED_FOLDER.glob("*.json"))


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("NVIDIA H200", ("h200",)),
        ("NVIDIA H200 NVL", ("h200",)),
        ("NVIDIA H100 80GB HBM3", ("h100", "h200")),
        ("NVIDIA H800", ("h100", "h200")),
        ("NVIDIA GH200 480GB", ("h100", "h200")),
        ("NVIDIA H20", ()),
        ("NVIDIA A100-SXM4-80GB", ()),
        ("AMD Instinct MI300X", ()),
    ],
)
def test_classes_of_gpus(name, names):
    assert lookup.shipped(name) == names


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_table_that_ships_is_fresh_and_holds_nothing_but_the_kernels_own_cuts(path):
    found = read(path)
    assert path.stem in lookup.shipped(found.stamp.device)[:1]
    assert found.sources == {kernel: source_digests()[kernel] for kernel in found.sources}, (
        "a kernel's source has changed since: measure again with `lq-kernels tune --device-preset`"
    )
    assert path.stat().st_size < table.MAX_BYTES / 4
    for (kernel, each), points in found.points.items():
        assert kernel == "dequant_blas" or points[0].cut
        for point in points:
            config_of(kernel, each, point.m, found.stamp.sm_count, point.cut)


def test_tables_are_in_the_package():
    folder = Path(lookup.__file__).parent
    assert all(path.parent == folder for path in SHIPPED)
