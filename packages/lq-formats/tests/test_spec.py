import json

import pytest
import torch
from lq_formats import GroupSizeError, QuantSpec, ShapeError, SpecError

SPECS = [
    pytest.param(QuantSpec(4, "group", 128), id="int4-g128-sym"),
    pytest.param(QuantSpec(3, "group", 8, False, torch.float16), id="int3-g8-asym-fp16"),
    pytest.param(QuantSpec(8, "row", None, True, torch.bfloat16), id="int8-row-sym-bf16"),
    pytest.param(QuantSpec(1, "tensor", None, False), id="int1-tensor-asym"),
]


@pytest.mark.parametrize("spec", SPECS)
def test_json_round_trip(spec):
    assert QuantSpec.from_json(spec.to_json()) == spec
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_specs_are_hashable_values():
    assert len({QuantSpec(4, "group", 64), QuantSpec(4, "group", 64), QuantSpec(4, "group", 32)}) == 2
    with pytest.raises(AttributeError):
        QuantSpec(4, "row").bits = 8


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"bits": 0}, SpecError, "bits=0"),
        ({"bits": 9, "granularity": "row"}, SpecError, "1 to 8"),
        ({"bits": True, "granularity": "row"}, SpecError, "bits=True"),
        ({"bits": 4.0, "granularity": "row"}, SpecError, "bits=4.0"),
        ({"bits": 1, "granularity": "row"}, SpecError, "symmetric=False"),
        ({"granularity": "column"}, SpecError, "tensor, row, group"),
        ({"granularity": "group"}, SpecError, "needs an integer group size"),
        ({"granularity": "group", "group_size": 7}, GroupSizeError, "at least 8"),
        ({"granularity": "group", "group_size": -1}, GroupSizeError, "at least 8"),
        ({"granularity": "group", "group_size": 32.0}, SpecError, "integer group size"),
        ({"granularity": "row", "group_size": 32}, SpecError, "granularity='group'"),
        ({"granularity": "row", "scale_dtype": torch.float64}, SpecError, "float16, bfloat16, float32"),
        ({"granularity": "row", "scale_dtype": [16]}, SpecError, "float16, bfloat16, float32"),
        ({"granularity": "row", "symmetric": "false"}, SpecError, "symmetric='false': expected True or False"),
        ({"granularity": "row", "symmetric": None}, SpecError, "symmetric=None"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_contradictions_are_named(arguments, error, match):
    with pytest.raises(error, match=match):
        QuantSpec(**arguments)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bits": "4"}, "bits='4'"),
        ({"symmetric": 1}, "symmetric=1"),
        ({"scale_dtype": "float64"}, "float64"),
        ({"scale_dtype": None}, "None"),
        ({"extra": 1}, "extra"),
    ],
)
def test_foreign_json_is_named(change, match):
    data = {**QuantSpec(4, "group", 128).to_dict(), **change}
    with pytest.raises(SpecError, match=match):
        QuantSpec.from_dict(data)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"bits": 4}', None])
def test_text_that_is_no_spec(text):
    with pytest.raises(SpecError):
        QuantSpec.from_json(text)


def test_codes_and_groups():
    spec = QuantSpec(4, "group", 32)
    assert (spec.midpoint, spec.max_code) == (8, 15)
    assert spec.resolve_group_size(96) == 32
    assert spec.scale_shape(5, 96) == (5, 3)
    assert QuantSpec(2, "row").scale_shape(5, 96) == (5, 1)
    assert QuantSpec(2, "tensor").scale_shape(5, 96) == (1, 1)
    with pytest.raises(GroupSizeError, match="does not divide in_features=100"):
        spec.resolve_group_size(100)
    with pytest.raises(ShapeError, match="in_features=0"):
        spec.resolve_group_size(0)
