import subprocess
import sys

import lq_formats
import lq_formats.gguf
import lq_formats.interop
import lq_formats.layouts
import pytest

NAMES = [
    "quantize_i4_pack8",
    "dequantize_i4_pack8",
    "quantize_weight_per_channel",
    "quantize_q4_0",
    "dequantize_q4_0",
    "quantize_q8_1",
    "dequantize_q8_1",
]


def case_order(names):
    """SCREAMING_CASE, then CamelCase, then snake_case: the order of the linter."""
    return sorted(names, key=lambda name: (0 if name.isupper() else 1 if name[0].isupper() else 2, name))


@pytest.mark.parametrize(
    "module",
    [lq_formats, lq_formats.gguf, lq_formats.interop, lq_formats.layouts],
    ids=lambda module: module.__name__,
)
def test_all_is_sorted_and_true(module):
    assert module.__all__ == case_order(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_promised_names_are_there():
    assert set(NAMES) <= set(lq_formats.__all__)


def test_import_does_no_work():
    code = (
        "import sys, torch, lq_formats; assert not torch.cuda.is_initialized();"
        "assert not {'triton', 'gguf', 'gemlite', 'transformers'} & set(sys.modules) - before"
    )
    code = "import sys, torch; before = set(sys.modules);" + code
    subprocess.run([sys.executable, "-c", code], check=True)
