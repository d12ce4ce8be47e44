"""The code blocks of the package's README run, in order, as one program, and name every public function."""

import re
from pathlib import Path

import lq_kernels
import torch
from lq_kernels.catalog import KERNELS

README = Path(__file__).parent.parent / "README.md"


def test_the_code_blocks_run():
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), str(README), "exec"), {})


def test_every_public_function_has_an_example_and_every_kernel_a_row():
    text = README.read_text(encoding="utf-8")
    examples = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    types = {"Explanation", "Kernel"}
    missing = [name for name in lq_kernels.__all__ if name not in types and not re.search(rf"\b{name}\(", examples)]
    assert not missing
    assert all(f"`{kernel.name}`" in text for kernel in KERNELS)
