"""The wgmma kernel for many tokens: its cuts and its code without a GPU, its results on one."""

import re
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from lq_formats.layouts import FRAGMENT_INT4, FRAGMENT_INT8
from lq_kernels.cuda.variant import Variant
from lq_kernels.cuda.wgmma_a16 import CLUSTERS, THREADS, TILES, WgmmaConfig, candidates, linear, ring, wgmma_config
from lq_kernels.jit import compiler


def has(package):
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


needs_nvrtc = pytest.mark.skipif(
    not (has("cuda.core") and has("cuda.bindings.nvrtc")), reason="needs the package 'cuda-core' with NVRTC"
)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT4 = Variant(BF16, BF16, 4, 1, False)
CASES = (
    [(INT4, tile) for tile in TILES]
    + [(INT4, (*tile, "multicast")) for tile in ((64, 128), (128, 256), (256, 128))]
    + [
        (Variant(BF16, FP32, 4, 4, True), (64, 128)),
        (Variant(FP16, BF16, 4, 2, True), (128, 256)),
        (Variant(FP16, FP32, 4, 0, True), (256, 128)),
        (Variant(BF16, FP32, 8, 0, False), (128, 256)),
        (Variant(FP16, FP32, 8, 0, False), (32, 128)),
    ]
)


def case_id(case):
    variant, (tokens, rows, *multicast) = case
    names = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
    zero = "asym" if variant.zero else "sym"
    tile = f"{tokens}x{rows}" + "-multicast" * len(multicast)
    return f"int{variant.bits}-{names[variant.x]}-{names[variant.scale]}-g{variant.groups}-{zero}-{tile}"


# ---- without a GPU ----


@needs_nvrtc
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_kernel_compiles_to_wgmma_from_registers_without_spills(case, tmp_path):
    variant, (tokens, rows, *multicast) = case
    config = WgmmaConfig(tokens, rows, 1, 1, 1, bool(multicast))
    defines = (*variant.defines, *config.defines)
    result = compiler.compile_source(compiler.source("wgmma_a16"), "sm_90a", "wgmma_a16", defines)
    usage = result.usage()
    assert set(usage) == {"wgmma_a16"}
    assert usage["wgmma_a16"].spills == 0
    assert usage["wgmma_a16"].stack == 0
    # So many registers a thread at launch that all CTAs of an SM fit; consumers then take the producer's.
    assert usage["wgmma_a16"].registers * THREADS * config.ctas <= 65536
    # "Potential performance loss: wgmma.mma_async instructions are serialized".
    assert "C75" not in result.log

    triton = find_spec("triton")
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm" if triton and triton.origin else None
    if tool is None or not tool.exists():
        pytest.skip("no disassembler: Triton, or a Triton with nvdisasm, is not installed")
    path = tmp_path / "kernel.cubin"
    path.write_bytes(result.cubin)
    sass = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout
    kind = "BF16" if variant.x == BF16 else "F32"
    products = re.findall(rf"HGMMA\.64x{tokens}x16\.F32\S* R\d+, R\d+, gdesc", sass)
    assert kind in products[0]
    assert len(products) == rows // 128 * (512 // variant.bits // 16)  # a stage, once
    assert not re.search(r"\b(LDL|STL)\b", sass)
    assert bool(re.search(r"UTMALDG\.2D\.MULTICAST", sass)) is config.multicast
    assert not re.search(r"\bI2FP?\b|\bI2F\b", sass.split("HGMMA", 1)[1].rsplit("HGMMA", 1)[0])


def test_shared_memory_fits_and_the_ring_is_deep_enough():
    for tokens, rows in TILES:
        config = WgmmaConfig(tokens, rows, 1, 1, 1)
        for bits, scale_bytes in ((4, 0), (4, 32), (4, 64), (4, 256), (4, 512), (8, 0)):
            stages, shared = ring(config, bits, scale_bytes)
            assert shared <= 232448 // config.ctas - (0 if config.ctas == 1 else 512)
            # A stage that is multiplied, one that is read ahead, and one in flight; the largest tile's widest scales leave two.
            assert stages >= (2 if (tokens, scale_bytes) == (256, 512) else 3), (tokens, rows, bits, scale_bytes)
            # A cluster's partial sums replace the ring.
            stage = tokens * 1024 // bits + rows // 16 * 1024
            assert tokens * (rows + 4) * 4 <= stages * stage
    assert ring(WgmmaConfig(256, 128, 1, 1, 1), 4, 32) == (3, 3 * (65536 + 8192 + 256) + 2 * 16 * 144 + 34 * 8)


SHAPES = [
    (m, n, k) for m in (1, 17, 64, 65, 128, 1000, 4096) for n, k in ((8, 8), (4096, 4096), (14336, 4096), (4100, 1000))
]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_cut_covers_the_product_once(m, n, k, bits):
    for config in candidates(m, n, k, bits, 132):
        assert (config.tokens, config.rows) in TILES
        assert config.cluster in CLUSTERS
        assert config.k_parts <= -(-k * bits // 512), "a CTA without a K step"
        row_tiles, token_tiles = config.tiles(m, n)
        assert row_tiles * config.cluster_rows >= n
        assert token_tiles * config.tokens >= m
        assert 1 <= config.clusters <= row_tiles * token_tiles
        assert config.clusters * config.cluster <= 132 * config.ctas
        assert 1 <= config.raster <= row_tiles
        assert config.cluster == 2 or not config.multicast
    assert wgmma_config(m, n, k, bits, 132) in set(candidates(m, n, k, bits, 132))


def test_cuts_follow_the_size():
    assert wgmma_config(64, 4096, 4096, 4, 132).cluster > 1, "32 tiles do not fill 132 multiprocessors"
    large = wgmma_config(4096, 4096, 4096, 4, 132)
    assert large.k_parts == 1
    assert large.clusters * large.cluster == 132
    assert large.tokens * large.rows == 32768, "the largest tile reads least"


@pytest.mark.parametrize(
    ("rows", "tokens", "raster", "clusters"), [(1, 1, 1, 1), (16, 32, 16, 132), (56, 9, 19, 132), (7, 5, 3, 4)]
)
def test_the_order_of_tiles_visits_each_once(rows, tokens, raster, clusters):
    # The same arithmetic as struct Tiles of the source.
    seen = []
    for start in range(clusters):
        for tile in range(start, rows * tokens, clusters):
            band, in_band = divmod(tile, raster * tokens)
            height = min(rows - band * raster, raster)
            token, row = divmod(in_band, height)
            seen.append((band * raster + row, token))
    assert sorted(seen) == [(row, token) for row in range(rows) for token in range(tokens)]


# ---- on a GPU ----


def another_gpu():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)


class Case:
    """A weight in fragment order, and the product of what the kernel makes of it."""

    def __init__(self, m, n, k, bits=4, group_size=128, x=BF16, scale=BF16, zero=None, bias=False, seed=0):
        generator = torch.Generator("cuda").manual_seed(seed)
        self.bits, self.n, self.group_size = bits, n, k if group_size == -1 else group_size
        self.x = torch.randn(m, k, generator=generator, device="cuda").to(x)
        codes = torch.randint(0, 1 << bits, (n, k), generator=generator, device="cuda", dtype=torch.uint8)
        groups = -(-k // self.group_size)
        scales = (torch.rand(n, groups, generator=generator, device="cuda") * 0.02 + 0.005).to(scale)
        zeros = None
        if zero == "integer":
            zeros = torch.randint(0, 16, (n, groups), generator=generator, device="cuda").to(scale)
        elif zero == "float":
            zeros = (torch.rand(n, groups, generator=generator, device="cuda") * 15).to(scale)
        self.bias = torch.randn(n, generator=generator, device="cuda").to(x) if bias else None
        layout = FRAGMENT_INT4 if bits == 4 else FRAGMENT_INT8
        padded = groups if self.group_size >= 128 or self.group_size == k else -(-k // 128) * (128 // self.group_size)
        self.packed = layout.pack(codes)
        self.scales = layout.arrange_scales(scales, padded)
        self.zeros = None if zeros is None else layout.arrange_scales(zeros, padded)

        def spread(values):
            return values.repeat_interleave(self.group_size, dim=1)[:, :k]

        middle = 1 << (bits - 1)
        difference = codes.double() - (middle if zeros is None else spread(zeros.to(x)).double())
        difference = difference.to(x).double()  # exact where zeros are integers
        if self.group_size == k:  # not rounded: it multiplies the sum
            self.weight, factor = difference, scales.double().T
        else:
            self.weight, factor = (difference * spread(scales.to(x)).double()).to(x).double(), 1.0
        self.exact = self.x.double() @ self.weight.T * factor
        self.magnitude = self.x.double().abs() @ self.weight.abs().T * factor
        if self.bias is not None:
            self.exact += self.bias.double()

    def run(self, config=None):
        return linear(
            self.x, self.packed, self.scales, self.zeros, self.bias, self.n, self.group_size, self.bits, config=config
        )

    def check(self, y):
        assert y.shape == self.exact.shape
        assert y.dtype == self.x.dtype
        error = (y.double() - self.exact).abs()
        # A rounding of the result, and fp32 sums.
        rounding = 2.0**-8 if y.dtype == BF16 else 2.0**-11
        bound = 1.01 * rounding * self.exact.abs() + 2e-6 * self.magnitude + 1e-6
        assert bool((error <= bound).all()), f"worst error is {(error / bound).max().item():.3g} times its bound"


def config_of(tile, cluster, m, n, clusters=10**6, raster=3):
    """Return a cut; cluster "multicast" is two CTAs that share tokens."""
    config = WgmmaConfig(*tile, 2 if cluster == "multicast" else cluster, 1, 1, cluster == "multicast")
    row_tiles, token_tiles = config.tiles(m, n)
    fit = 128 * config.ctas // config.cluster
    return replace(config, clusters=min(row_tiles * token_tiles, fit, clusters), raster=min(raster, row_tiles))


hopper = [pytest.mark.gpu, pytest.mark.skipif("another_gpu()", reason="needs compute capability 9.0")]


class TestOnHopper:
    pytestmark = hopper

    @pytest.mark.parametrize("cluster", [*CLUSTERS, "multicast"])
    @pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile[0]}x{tile[1]}")
    def test_every_tile_and_cluster(self, tile, cluster):
        m, n, k = tile[0] + tile[0] // 2 + 1, 2 * tile[1] + 40, 2176
        case = Case(m, n, k, bias=True)
        case.check(case.run(config_of(tile, cluster, m, n)))
        # One cluster that takes every tile.
        case.check(case.run(config_of(tile, cluster, m, n, clusters=1)))

    @pytest.mark.parametrize("tile", [(64, 128), (128, 256), (256, 128)], ids=lambda tile: f"{tile[0]}x{tile[1]}")
    @pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
    @pytest.mark.parametrize("zero", [None, "integer", "float"])
    @pytest.mark.parametrize(("x", "scale"), [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, BF16)])
    def test_int4(self, tile, group_size, zero, x, scale):
        case = Case(100, 264, 1024, 4, group_size, x, scale, zero)
        for cluster in (1, 4, "multicast"):
            case.check(case.run(config_of(tile, cluster, 100, 264)))

    @pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile[0]}x{tile[1]}")
    @pytest.mark.parametrize("x", [BF16, FP16])
    def test_int8(self, tile, x):
        case = Case(100, 264, 1000, 8, -1, x, FP32, bias=True)
        for cluster in (1, 2, 8, "multicast"):
            case.check(case.run(config_of(tile, cluster, 100, 264)))

    @pytest.mark.parametrize(
        ("m", "n", "k"),
        [
            (1, 16, 8),
            (17, 1, 8),
            (33, 7, 136),
            (64, 15, 264),
            (65, 127, 1096),
            (129, 129, 4096),
            (300, 4099, 512),
            (1000, 5000, 1032),
        ],
    )
    def test_awkward_shapes(self, m, n, k):
        for bits in (4, 8):
            case = Case(m, n, k, bits, 128 if bits == 4 else -1, scale=BF16 if bits == 4 else FP32, bias=True)
            case.check(case.run())

    @pytest.mark.parametrize("m", [17, 64, 128, 256, 1024, 4096])
    @pytest.mark.parametrize(("n", "k"), [(4096, 4096), (14336, 4096), (4096, 14336)])
    def test_model_shapes_twice_with_equal_bits(self, m, n, k):
        case = Case(m, n, k)
        first = case.run()
        case.check(first)
        for _ in range(5):
            assert torch.equal(case.run(), first)

    def test_rows_of_a_wider_tensor(self):
        case = Case(100, 256, 512)
        wide = torch.full((100, 1024), torch.nan, device="cuda", dtype=BF16)
        wide[:, 256:768] = case.x
        case.x = wide[:, 256:768]
        case.check(case.run())

    def test_nothing_is_written_past_the_result(self):
        # Results that follow each other in memory: the second launch must leave the first one's alone, and the other way round.
        cases = [Case(m, n, 256, seed=m) for m, n in ((17, 9), (63, 130), (129, 24))]
        results = [case.run() for case in cases for _ in range(3)]
        for case, y in zip((case for case in cases for _ in range(3)), results, strict=True):
            case.check(y)
