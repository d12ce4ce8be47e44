"""Codes to floats by bit tricks, shared by every Triton kernel.

A code that is OR-ed into the mantissa of ``2**23`` *is* the float ``2**23 + code``; one exact subtraction removes the power.
That is two full-rate operations, where an integer-to-float conversion runs at a quarter of the rate or less. A following
conversion of the float to bfloat16 or float16 is exact (every value is an integer below 256) and handles two at a time.

=====  ==============================================  =========
int4   ``(u | 0x4B000000)`` as float, minus 8388616    ``u - 8``
int8   ``(q ^ 0x80 | 0x4B000000)`` as float,           ``q``
       minus 8388736
=====  ==============================================  =========
"""

import triton
import triton.language as tl


@triton.jit
def int4_values(words):
    """Unpack ``words: (A, B) int32`` to ``(A, B, 8)`` float32 values ``u - 8``, k fastest."""
    shifts = tl.arange(0, 8) * 4
    codes = (words[:, :, None] >> shifts[None, None, :]) & 0xF
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


@triton.jit
def int8_values(codes):
    """Turn signed ``codes: int8`` into exact float32 values."""
    wide = (codes.to(tl.int32) & 0xFF) ^ 0x80
    return (wide | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
