import re
from pathlib import Path

import pytest
import torch
from lq_eval.schemes import DEMO_SCHEMES, MATRIX_SCHEMES, measure_matrix, parse_scheme, parse_schemes
from lq_formats import GroupSizeError, SpecError
from lq_torch import GGMLWeightOnlyConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig


@pytest.fixture(scope="module")
def normal():
    return torch.randn(512, 8192, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("int8", Int8WeightOnlyConfig()),
        ("int8-tensor", Int8WeightOnlyConfig(granularity="tensor")),
        ("int4-g64", Int4WeightOnlyConfig(group_size=64, int4_choose_qparams_algorithm="rtn")),
        ("int4-g64-rtn", Int4WeightOnlyConfig(group_size=64, int4_choose_qparams_algorithm="rtn")),
        ("int4-g64-mse", Int4WeightOnlyConfig(group_size=64)),
        (
            "int4-row-asym-hqq",
            Int4WeightOnlyConfig(group_size=-1, symmetric=False, int4_choose_qparams_algorithm="hqq"),
        ),
        (
            "int4-g128-mse:gemlite",
            Int4WeightOnlyConfig(group_size=128, int4_packing_format="gemlite", int4_choose_qparams_algorithm="mse"),
        ),
        ("q4_0", GGMLWeightOnlyConfig("q4_0")),
        ("q6_k", GGMLWeightOnlyConfig("q6_k")),
        ("mxfp4", GGMLWeightOnlyConfig("mxfp4")),
    ],
)
def test_names_stand_for_configurations(name, config):
    assert parse_scheme(name) == config


@pytest.mark.parametrize("name", ["int5", "int4", "int4-g", "int4-gx", "q4_0-asym", "q9_9", "q4_kk", ""])
def test_unknown_names_are_refused(name):
    with pytest.raises(SpecError):
        parse_scheme(name)


def test_the_readmes_table_has_a_row_for_every_scheme_of_the_demo():
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    table = readme.partition("| scheme | bits per weight |")[2].partition("\n\n")[0].splitlines()[2:]
    assert [line.split("|")[1].strip() for line in table] == ["float", *DEMO_SCHEMES]


def test_every_listed_scheme_parses():
    assert list(parse_schemes(",".join(DEMO_SCHEMES))) == list(DEMO_SCHEMES)
    assert len(parse_schemes(",".join(MATRIX_SCHEMES))) == len(MATRIX_SCHEMES)
    with pytest.raises(SpecError, match="no scheme"):
        parse_schemes(" , ")


@pytest.mark.parametrize(
    ("scheme", "mae", "reduction_fp32", "reduction_fp16"),
    [
        ("int4-row", 0.1415, 4.00, 4.00),
        ("int4-g128", 0.1002, 3.76, 3.88),
        ("int4-g256", 0.1083, 3.88, 3.94),
    ],
)
def test_the_published_table(normal, scheme, mae, reduction_fp32, reduction_fp16):
    wide, narrow = measure_matrix(normal, [scheme])
    assert (wide.scale_dtype, narrow.scale_dtype) == ("float32", "float16")
    assert wide.mae == pytest.approx(mae, rel=0.006)
    assert narrow.mae == pytest.approx(wide.mae, rel=1e-3)
    assert round(wide.reduction, 2) == reduction_fp32
    assert round(narrow.reduction, 2) == reduction_fp16


def test_bits_count_codes_scales_and_zeros(normal):
    bits = {
        (row.scheme, row.scale_dtype): row.bits_per_weight
        for row in measure_matrix(normal[:64], ["int4-g128", "int4-g128-asym", "q4_0", "int8"])
    }
    assert bits["int4-g128", "float16"] == 4 + 16 / 128
    assert bits["int4-g128-asym", "float32"] == 4 + (32 + 8) / 128
    assert bits["q4_0", "float16"] == 4.5
    assert bits["int8", "float32"] == 8 + 32 / 8192


@pytest.mark.parametrize(
    "scheme",
    [
        *(name for name in DEMO_SCHEMES if name.startswith("int4")),
        *("int4-g128-asym-hqq", "int4-g128:plain", "int4-g128:preshuffled"),
        *(f"int4-{group}-a8-{activation}" for group in ("g128", "row") for activation in ("fp8", "int8")),
    ],
)
def test_every_int4_scheme_has_scales_of_the_dtype_asked_for(normal, scheme):
    """float32 takes 16 bits more than float16 and bfloat16 for each scale, and for each zero that is no code."""
    columns = 1024
    values = 2 if re.search("asym-(mse|hqq)", scheme) else 1
    wide, half, brain = measure_matrix(normal[:64, :columns], [scheme], ["float32", "float16", "bfloat16"])
    group = re.match(r"int4-g(\d+)", scheme)
    assert wide.bits_per_weight - half.bits_per_weight == values * 16 / (int(group[1]) if group else columns)
    assert half.bits_per_weight == brain.bits_per_weight


def test_finer_groups_err_less(normal):
    errors = [row.mae for row in measure_matrix(normal[:64], ["int4-g32", "int4-g128", "int4-row"], ["float32"])]
    assert errors == sorted(errors)


def test_bad_input_is_named(normal):
    with pytest.raises(SpecError, match="scale dtype"):
        list(measure_matrix(normal, ["int8"], ["float8"]))
    with pytest.raises(GroupSizeError):
        list(measure_matrix(normal[:, :100], ["int4-g128"]))
