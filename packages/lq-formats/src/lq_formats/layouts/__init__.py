"""Layouts: where the bits of quantized weights lie, as objects with ``pack``, ``unpack`` and ``packed_shape``.

Three kinds of layout share these names. A *code layout* (``INT4``, ``INT8``, ``GEMLITE``, ``FRAGMENT_INT4``,
``FRAGMENT_INT8``, ``FRAGMENT_A8_INT8``, ``FRAGMENT_A8_FP8``) turns codes ``(N, K)`` into one
tensor; scales and zeros are kept beside it. A *checkpoint layout* (``GPTQ``, ``GPTQ_V2``, ``AWQ``,
``COMPRESSED_TENSORS``, ``HQQ``) turns a whole :class:`AffineWeight` into the named tensors that another library saves for one
linear layer. A *plane layout* (``GGML_PLANES``, one a ggml type) takes ggml's blocks apart for kernels, a *fragment layout*
(``GGML_FRAGMENTS``) for those of Hopper. All directions are exact: what was packed comes back bit for bit, and what a format
cannot hold is an error.
"""

from lq_formats.layouts.affine_weight import AffineWeight
from lq_formats.layouts.awq import AWQ, AWQLayout
from lq_formats.layouts.compressed_tensors import COMPRESSED_TENSORS, CompressedTensorsLayout
from lq_formats.layouts.fragment import FRAGMENT_INT4, FRAGMENT_INT8, FragmentLayout
from lq_formats.layouts.fragment8 import FRAGMENT_A8_FP8, FRAGMENT_A8_INT8, Fragment8Layout
from lq_formats.layouts.gemlite import GEMLITE, GemliteLayout
from lq_formats.layouts.ggml import GGML_PLANES, GGMLPlanes, GGMLPlanesLayout, ggml_planes
from lq_formats.layouts.ggml_fragment import GGML_FRAGMENTS, GGMLFragments, GGMLFragmentsLayout
from lq_formats.layouts.gptq import GPTQ, GPTQ_V2, GPTQLayout
from lq_formats.layouts.hqq import HQQ, HQQLayout
from lq_formats.layouts.int4 import INT4, Int4Layout
from lq_formats.layouts.int8 import INT8, Int8Layout

__all__ = [
    "AWQ",
    "COMPRESSED_TENSORS",
    "FRAGMENT_A8_FP8",
    "FRAGMENT_A8_INT8",
    "FRAGMENT_INT4",
    "FRAGMENT_INT8",
    "GEMLITE",
    "GGML_FRAGMENTS",
    "GGML_PLANES",
    "GPTQ",
    "GPTQ_V2",
    "HQQ",
    "INT4",
    "INT8",
    "AWQLayout",
    "AffineWeight",
    "CompressedTensorsLayout",
    "Fragment8Layout",
    "FragmentLayout",
    "GGMLFragments",
    "GGMLFragmentsLayout",
    "GGMLPlanes",
    "GGMLPlanesLayout",
    "GPTQLayout",
    "GemliteLayout",
    "HQQLayout",
    "Int4Layout",
    "Int8Layout",
    "ggml_planes",
]
