"""The batch-invariant mode: rows depend neither on each other nor on their number, bit for bit, in every product."""

import lq_kernels
import pytest
import torch
from lq_formats import (
    NoKernelError,
    QuantSpec,
    choose_qparams,
    pack_int4,
    quantize_affine,
    quantize_q4_0,
    quantize_weight_per_channel,
)
from lq_formats.ggml import ggml_format
from lq_formats.layouts import ggml_planes
from lq_kernels import (
    Arch,
    Problem,
    batch_invariant,
    explain,
    is_batch_invariant,
    kernel_names,
    select,
    set_batch_invariant,
)
from lq_kernels.invariant_kernels import KERNELS
from lq_kernels.reference import int4_spec

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = Arch("cpu")
GPUS = (Arch("cuda", (9, 0), "NVIDIA H200", 132), Arch("cuda", (8, 9), "NVIDIA L4", 58), Arch("cuda", (7, 5), "T4", 40))


def int4(n, k, group, dtype, device, symmetric=True):
    spec = int4_spec(group, k, symmetric, dtype)
    w = torch.randn(n, k, device=device)
    scale, zero = choose_qparams(w, spec)
    return pack_int4(quantize_affine(w, scale, zero, spec)), scale, zero


def products(n, k, group, dtype, device):
    """Yield the name of every product that takes these sizes, and a function of x."""
    qweight, scale, zero = int4(n, k, group, dtype, device, symmetric=False)
    yield "int4-asym", lambda x: lq_kernels.int4_linear(x, qweight, scale, zero, group_size=group)
    symmetric = int4(n, k, group, dtype, device)[:2]
    yield "int4", lambda x: lq_kernels.matmul_bf16_i4(x, *symmetric, group)
    codes, scales = quantize_weight_per_channel(torch.randn(n, k, device=device))
    bias = torch.randn(n, device=device).to(dtype)
    yield "int8", lambda x: lq_kernels.int8_gemm(x, codes, scales, bias)
    yield "int8-dynamic", lambda x: lq_kernels.int8_dynamic_linear(x, codes, scales, bias)
    fp8 = codes.float().to(torch.float8_e4m3fn)
    yield "fp8-dynamic", lambda x: lq_kernels.int8_dynamic_linear(x, fp8, scales)
    if group == k or group in (32, 64) or group % 128 == 0:
        packed = lq_kernels.preshuffle_int4(*symmetric, group_size=group, in_features=k)
        sizes = {"group_size": group, "out_features": n}
        yield "preshuffled", lambda x: lq_kernels.preshuffled_linear(x, *packed, bits=4, **sizes, bias=bias)
        yield (
            "preshuffled-residual",
            lambda x: lq_kernels.preshuffled_linear(
                x, *packed, bits=4, **sizes, residual=x[..., :1].expand(*x.shape[:-1], n).contiguous()
            ),
        )
        rows = (lq_kernels.interleave_rows(tensor) for tensor in symmetric)
        pair = lq_kernels.preshuffle_int4(*rows, group_size=group, in_features=k)
        half = {"group_size": group, "out_features": n // 2, "bias": bias}
        yield "preshuffled-gated", lambda x: lq_kernels.preshuffled_gated_linear(x, *pair, bits=4, **half)
    if group == k or group % 128 == 0:
        for activation in ("int8", "fp8"):
            weight, its_scale, lowest = lq_kernels.pack_int4_dynamic(
                *symmetric, group_size=group, in_features=k, activation=activation
            )
            rest = {"group_size": group, "out_features": n, "activation": activation, "lowest": lowest}
            yield (
                f"int4-dynamic-{activation}",
                lambda x, weight=weight, its_scale=its_scale, rest=rest: lq_kernels.int4_dynamic_linear(
                    x, weight, its_scale, bias, **rest
                ),
            )
    if k % 32 == 0:
        blocks = quantize_q4_0(torch.randn(n, k, device=device)).view(n, k // 32, 18)
        yield "q4_0", lambda x: lq_kernels.q4_0_linear(x, blocks)
        yield (
            "q4_0_q8_1",
            lambda x: lq_kernels.gemm_q4_0_q8_1(
                blocks, lq_kernels.quantize_activation_q8_1(x), n, x.shape[0], k
            ).T.contiguous(),
        )
        yield "q4_0_q8_1-at-once", lambda x: lq_kernels.quantize_gemm_q4_0_q8_1(blocks, x).T.contiguous()
    if k % 256 == 0:
        planes = ggml_planes("q4_k").pack(ggml_format("q4_k").quantize(torch.randn(n, k, device=device)))
        yield "ggml", lambda x: lq_kernels.ggml_linear(x, planes, ggml_type="q4_k", bias=bias)


def check(name, product, x, ms):
    """Check that every row of every product of the first tokens, and of some in the middle, is that of the token alone."""
    with batch_invariant():
        alone = torch.cat([product(token) for token in x.split(1)])
        for m in ms:
            assert torch.equal(product(x[:m]), alone[:m]), f"{name}: M={m} differs from one token at a time"
        assert torch.equal(product(x[3:40]), alone[3:40]), f"{name}: rows depend on where they are"
        assert torch.equal(product(x.flip(0)), alone.flip(0)), f"{name}: rows depend on each other"
        others = x.clone()
        others[1:] = torch.nan
        assert torch.equal(product(others)[:1], alone[:1]), f"{name}: rows depend on each other"
    return alone


class TestRows:
    @pytest.mark.parametrize(("n", "k", "group"), [(48, 256, 128), (40, 104, 104), (64, 520, 520), (24, 77, 77)])
    @pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
    def test_on_a_cpu(self, n, k, group, dtype):
        x = torch.randn(70, k).to(dtype)
        for name, product in products(n, k, group, dtype, "cpu"):
            alone = check(name, product, x, range(1, 71) if dtype == FP32 else (2, 3, 5, 8, 9, 16, 17, 33, 70))
            usual = product(x)
            error = (alone.double() - usual.double()).norm() / usual.double().norm()
            assert error < {FP32: 1e-5, FP16: 2e-3, BF16: 1e-2}[dtype], f"{name}: another result altogether"

    def test_the_usual_products_differ(self):
        """What is asked above is not so by default: with long sums, in float32, some row has other bits in a batch."""
        x = torch.randn(70, 2048)
        differ = []
        for name, product in products(64, 2048, 2048, FP32, "cpu"):
            alone = torch.cat([product(token) for token in x.split(1)])
            if not torch.equal(product(x), alone):
                differ.append(name)
        assert differ

    @pytest.mark.gpu
    @pytest.mark.parametrize(
        ("n", "k", "group"),
        [(512, 512, 128), (264, 1032, 1032), (264, 1001, 1001), (4096, 4096, 128), (2048, 8192, 128), (1024, 4096, 32)],
    )
    @pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
    def test_on_a_gpu(self, n, k, group, dtype):
        x = (0.1 * torch.randn(4096, k, device="cuda")).to(dtype)  # products of two sums fit float16
        for name, product in products(n, k, group, dtype, "cuda"):
            with batch_invariant():
                alone = torch.cat([product(token) for token in x[:300].split(1)])
                for m in (*range(1, 301), 1024, 4096):
                    y = product(x[:m])
                    assert torch.equal(y[:300], alone[:m]), f"{name}: M={m} differs from one token at a time"
                    if m == 1024:
                        some = y
                assert torch.equal(y[:1024], some), f"{name}: rows differ between M=1024 and 4096"
                tail = torch.cat([product(token) for token in x[-40:].split(1)])
                assert torch.equal(y[-40:], tail), f"{name}: the last rows depend on where they are"
                others = x[:300].clone()
                others[1:] = torch.nan
                assert torch.equal(product(others)[:1], alone[:1]), f"{name}: rows depend on each other"
            usual = product(x).double()
            assert (y.double() - usual).norm() / usual.norm() < 1e-2, f"{name}: another result altogether"

    @pytest.mark.gpu
    @pytest.mark.parametrize("kernel", ["triton-splitk", "dequant-blas"])
    def test_forced_kernels_on_a_gpu(self, kernel):
        x = torch.randn(130, 1024, device="cuda", dtype=BF16)
        qweight, scale, zero = int4(256, 1024, 128, BF16, "cuda", symmetric=False)
        check(
            kernel,
            lambda x: lq_kernels.int4_linear(x, qweight, scale, zero, group_size=128, kernel=kernel),
            x,
            (*range(1, 131, 3), 130),
        )

    @pytest.mark.gpu
    def test_float32_on_a_gpu(self):
        x = torch.randn(100, 512, device="cuda")
        for name, product in products(128, 512, 128, FP32, "cuda"):
            check(name, product, x, (*range(1, 101, 7), 100))


class TestSelection:
    @pytest.fixture(autouse=True)
    def _everything_is_installed(self, monkeypatch):
        from lq_kernels.cuda import constraints as cuda
        from lq_kernels.triton import constraints as triton
        from lq_kernels.tuned import lookup

        monkeypatch.setattr(triton, "_installed", lambda: True)
        monkeypatch.setattr(cuda, "why_not_compile", lambda: None)
        monkeypatch.setattr(lookup, "_loaded", lambda device, sm_count: ())
        lookup.forget()
        yield
        lookup.forget()

    def problems(self, m, arch):
        grouped, row = QuantSpec(4, "group", 128, True, BF16), QuantSpec(8, "row", None, True, FP32)
        small = QuantSpec(4, "group", 8, True, BF16)
        blocks = QuantSpec(4, "group", 32, True, FP16)
        sizes = (m, 4096, 4096)
        for dtype in (BF16, FP32):
            yield Problem("int4", *sizes, grouped, dtype, arch, batch_invariant=True)
            yield Problem("int4", *sizes, small, dtype, arch, batch_invariant=True)
            yield Problem("int8", *sizes, row, dtype, arch, batch_invariant=True)
            yield Problem("preshuffled", *sizes, grouped, dtype, arch, batch_invariant=True)
            yield Problem("int4_dynamic", *sizes, grouped, dtype, arch, "fp8", batch_invariant=True)
            yield Problem("int8_dynamic", *sizes, row, dtype, arch, "int8", batch_invariant=True)
            yield Problem("q4_0", *sizes, blocks, dtype, arch, batch_invariant=True)
            yield Problem("ggml", *sizes, grouped, dtype, arch, batch_invariant=True)
        yield Problem("q4_0_q8_1", *sizes, blocks, FP32, arch, batch_invariant=True)

    @pytest.mark.parametrize("arch", [CPU, *GPUS], ids=["cpu", "h200", "l4", "t4"])
    def test_the_kernel_is_the_same_for_all_tokens(self, arch):
        for one in self.problems(1, arch):
            chosen = select(one)
            assert chosen in KERNELS
            for m in (2, 16, 17, 64, 100, 512, 4096):
                many = Problem(one.op, m, one.n, one.k, one.spec, one.dtype, one.arch, one.activation, True)
                assert select(many) is chosen
                assert chosen.predict_us(many) > 0

    def test_hopper_takes_the_kernels_whose_order_is_known(self):
        problems = [problem for problem in self.problems(7, GPUS[0]) if problem.dtype == BF16]
        chosen = {(problem.op, select(problem).name) for problem in problems if problem.group_size >= 32}
        assert {name for _, name in chosen} == {"cuda-prefill", "cuda-a8", "triton-splitk"}
        assert {op for op, name in chosen if name == "triton-splitk"} == {"ggml"}

    def test_explain_says_that_the_mode_is_on(self):
        problem = next(iter(self.problems(1, GPUS[0])))
        usual = Problem("int4", 1, problem.n, problem.k, problem.spec, problem.dtype, problem.arch)
        assert "batch-invariant" not in str(explain(usual))
        with batch_invariant():
            explanation = explain(usual)
        assert explanation == explain(problem)
        assert explanation.chosen == "cuda-prefill"
        assert "PrefillConfig" in explanation.cut
        text = str(explanation)
        assert "on NVIDIA H200, batch-invariant" in text
        assert "not cuda-decode: its results depend on the number of tokens" in text
        assert "not triton-splitk: comes after cuda-prefill" in text
        assert len(explanation.rejected) == len(kernel_names("int4")) - 1

    def test_a_kernel_without_such_a_form_is_an_error(self):
        for problem in self.problems(1, GPUS[0]):
            with pytest.raises(NoKernelError, match="depend on the number of tokens"):
                select(problem, "reference")
        with pytest.raises(NoKernelError, match="there is no such kernel"):
            select(problem, "no-such-kernel")


class TestProducts:
    def test_a_weight_that_was_multiplied_before_changes_its_kernel(self):
        """The shortcut past the dispatcher keeps what it does in the mode apart."""
        qweight, scale, _ = int4(48, 2048, 128, FP32, "cpu")
        x = torch.randn(9, 2048)

        def call():
            return lq_kernels.int4_linear(x, qweight, scale, group_size=128)

        usual = [call(), call()]
        with batch_invariant():
            alone = torch.cat([lq_kernels.int4_linear(token, qweight, scale, group_size=128) for token in x.split(1)])
            inside = [call(), call()]
        assert all(torch.equal(y, alone) for y in inside)
        assert torch.equal(call(), usual[0])

    def test_a_forced_kernel_without_such_a_form_is_an_error(self):
        qweight, scale, _ = int4(48, 256, 128, FP32, "cpu")
        x = torch.randn(2, 256)
        lq_kernels.int4_linear(x, qweight, scale, group_size=128, kernel="reference")
        with batch_invariant(), pytest.raises(NoKernelError, match="batch-invariant"):
            lq_kernels.int4_linear(x, qweight, scale, group_size=128, kernel="reference")

    def test_no_tokens(self):
        for name, product in products(48, 256, 128, FP32, "cpu"):
            with batch_invariant():
                assert product(torch.empty(0, 256)).numel() == 0, name

    def test_gradients_are_there(self):
        for name, product in products(48, 256, 128, FP32, "cpu"):
            if name == "q4_0_q8_1":
                continue
            x = torch.randn(3, 256, requires_grad=True)
            with batch_invariant():
                product(x).sum().backward()
            assert x.grad.abs().sum() > 0, name


class TestCompiled:
    @pytest.fixture
    def asked(self, monkeypatch):
        """Return whether each product that ran was batch-invariant."""
        from lq_kernels import ops

        seen = []

        def spy(problem, kernel, chosen=ops._chosen):
            seen.append(kernel.startswith("batch-invariant"))
            return chosen(problem, kernel)

        monkeypatch.setattr(ops, "_chosen", spy)
        torch._dynamo.reset()
        return seen

    def test_a_compiled_function_follows_the_mode(self, asked):
        qweight, scale, _ = int4(48, 256, 128, FP32, "cpu")
        f = torch.compile(
            lambda x: lq_kernels.int4_linear(x, qweight, scale, group_size=128), fullgraph=True, backend="aot_eager"
        )
        x = torch.randn(5, 256)
        f(x)
        with batch_invariant():
            f(x)
            with batch_invariant(False):
                f(x)
        f(x)
        set_batch_invariant(True)
        try:
            f(x)
        finally:
            set_batch_invariant(False)
        f(x)
        assert asked == [False, True, False, False, True, False]

    def test_the_mode_may_be_switched_inside(self, asked):
        qweight, scale, _ = int4(48, 256, 128, FP32, "cpu")

        def f(x):
            y = lq_kernels.int4_linear(x, qweight, scale, group_size=128)
            with batch_invariant():
                y = y + lq_kernels.int4_linear(x, qweight, scale, group_size=128)
            return y + lq_kernels.int4_linear(x, qweight, scale, group_size=128)

        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            compiled(torch.randn(5, 256))
        assert asked == [False, True, False] * 2
        assert not is_batch_invariant()
