"""Products with a weight that was multiplied before: the same results, and nothing that changed goes unnoticed."""

import gc
import threading
import weakref

import pytest
import torch
from lq_formats import DeviceError, DTypeError, GroupSizeError, ShapeError, pack_int4
from lq_kernels import eager, int4_linear, int8_gemm, linear, preshuffle_int4, preshuffled, preshuffled_linear

K, N, GROUP = 256, 48, 64
BF16 = torch.bfloat16


def int4_weight(device="cpu", n=N, k=K, zero=True):
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
    scale = (torch.rand(n, k // GROUP, device=device) + 0.5).to(BF16)
    return (
        pack_int4(codes),
        scale,
        torch.randint(0, 16, scale.shape, dtype=torch.uint8, device=device) if zero else None,
    )


def int8_weight(device="cpu", n=N, k=K):
    return torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device), torch.rand(n, device=device) + 0.5


def products(device="cpu", n=N, k=K):
    """Yield each function with its weight bound, a tensor of the weight, and the module whose checks the call skips."""
    q, scale, zero = int4_weight(device, n, k)
    yield lambda x, **more: int4_linear(x, q, scale, zero, group_size=GROUP, **more), q, linear
    w, row = int8_weight(device, n, k)
    yield lambda x, **more: int8_gemm(x, w, row, **more), w, linear
    packed, arranged, _ = preshuffle_int4(*int4_weight(device, n, k, zero=False), group_size=GROUP, in_features=k)
    sizes = {"bits": 4, "group_size": GROUP, "out_features": n}
    yield lambda x, **more: preshuffled_linear(x, packed, arranged, **sizes, **more), packed, preshuffled


def fail(*args, **kwargs):
    raise AssertionError("the arguments were checked again")


@pytest.mark.parametrize("case", range(3))
class TestKnownWeight:
    def test_second_call_skips_the_checks_and_gives_the_same(self, case, monkeypatch):
        call, _, module = list(products())[case]
        x = torch.randn(5, K, dtype=BF16)
        first = call(x)
        monkeypatch.setattr(module, "check_activations", fail)
        assert torch.equal(call(x), first)
        assert torch.equal(call(x.view(1, 5, 1, K)), first.view(1, 5, 1, N))
        assert torch.equal(call(x.t().contiguous().t()), first)

    def test_result_equals_the_operators(self, case):
        call, _, _ = list(products())[case]
        for m in (1, 2, 33):
            x = torch.randn(m, K, dtype=BF16)
            call(x)
            known = call(x)
            with torch.autograd.profiler.profile():
                assert torch.equal(call(x), known)

    def test_change_in_place_is_noticed(self, case):
        call, weight, _ = list(products())[case]
        x = torch.randn(3, K, dtype=BF16)
        before = call(x)
        weight.bitwise_xor_(1)
        assert not torch.equal(call(x), before)
        weight.bitwise_xor_(1)
        assert torch.equal(call(x), before)

    def test_new_data_is_noticed(self, case, monkeypatch):
        call, weight, _ = list(products())[case]
        x = torch.randn(3, K, dtype=BF16)
        before = call(x)
        weight.data = weight.data ^ 1
        with monkeypatch.context() as patch:
            patch.setattr(eager._Known, "multiply", fail)  # what a GPU's kernel was bound to has the old address
            assert not torch.equal(call(x), before)

    def test_errors_stay_errors(self, case):
        call, _, _ = list(products())[case]
        call(torch.randn(3, K, dtype=BF16))
        with pytest.raises(ShapeError):
            call(torch.randn(3, K + 8, dtype=BF16))
        with pytest.raises(ShapeError):
            call(torch.tensor(1.0, dtype=BF16))
        with pytest.raises(DTypeError):
            call(torch.zeros(3, K, dtype=torch.float64))
        with pytest.raises(DeviceError):
            call(torch.empty(3, K, dtype=BF16, device="meta"))
        with pytest.raises(ShapeError):
            call(torch.randn(3, K, dtype=BF16), bias=torch.zeros(N + 1, dtype=BF16))

    def test_no_tokens(self, case):
        call, _, _ = list(products())[case]
        call(torch.randn(3, K, dtype=BF16))
        assert call(torch.empty(2, 0, K, dtype=BF16)).shape == (2, 0, N)

    def test_gradient_is_there_where_it_is_wanted(self, case):
        call, _, _ = list(products())[case]
        x = torch.randn(3, K, dtype=BF16)
        call(x)
        x.requires_grad_()
        call(x).sum().backward()
        assert x.grad is not None
        assert x.grad.abs().sum() > 0

    def test_bias_is_added(self, case):
        call, _, _ = list(products())[case]
        x, bias = torch.randn(3, K, dtype=BF16), torch.randn(N, dtype=BF16)
        plain = call(x)
        first = call(x, bias=bias)
        assert torch.equal(call(x, bias=bias), first)
        # Rounded once, or twice; where the summands cancel, the first rounding is large beside what is left.
        torch.testing.assert_close(first, plain + bias, rtol=2**-7, atol=float(plain.abs().max()) * 2**-8)
        bias.zero_()
        assert torch.equal(call(x, bias=bias), plain)

    def test_operator_is_seen_by_who_looks(self, case):
        call, _, _ = list(products())[case]
        x = torch.randn(3, K, dtype=BF16)
        call(x)
        with torch.profiler.profile() as profile:
            call(x)
        assert any(event.key.startswith("lq::") for event in profile.key_averages())
        vmapped = torch.func.vmap(call)(x[None])
        assert torch.equal(vmapped[0], call(x))

    def test_compiles_after_it_is_known(self, case):
        call, _, _ = list(products())[case]
        x = torch.randn(3, K, dtype=BF16)
        expected = call(x)
        assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(x), expected)


def test_other_scale_and_group_size_are_noticed():
    q, scale, zero = int4_weight()
    x = torch.randn(3, K, dtype=BF16)
    first = int4_linear(x, q, scale, zero, group_size=GROUP)
    assert torch.equal(int4_linear(x, q, scale * 2, zero, group_size=GROUP), first * 2)
    assert not torch.equal(int4_linear(x, q, scale, None, group_size=GROUP), first)
    with pytest.raises(ShapeError):
        int4_linear(x, q, scale, zero, group_size=2 * GROUP)
    with pytest.raises(GroupSizeError):
        int4_linear(x, q, scale, zero, group_size=GROUP + 1)
    scale.mul_(4)
    assert torch.equal(int4_linear(x, q, scale, zero, group_size=GROUP), first * 4)


def test_inference_tensors_are_not_kept():
    with torch.inference_mode():
        q, scale, zero = int4_weight()
        x = torch.randn(3, K, dtype=BF16)
        first = int4_linear(x, q, scale, zero, group_size=GROUP)
        assert id(q) not in eager._known
        q.bitwise_xor_(1)
        assert not torch.equal(int4_linear(x, q, scale, zero, group_size=GROUP), first)


def test_weight_that_ends_is_forgotten():
    q, scale, zero = int4_weight()
    int4_linear(torch.randn(3, K, dtype=BF16), q, scale, zero, group_size=GROUP)
    key = id(q)
    assert key in eager._known
    del q
    gc.collect()
    assert key not in eager._known


def test_entry_of_a_changed_weight_ends_at_once():
    q, scale, zero = int4_weight()
    x = torch.randn(3, K, dtype=BF16)
    int4_linear(x, q, scale, zero, group_size=GROUP)
    before = weakref.ref(eager._known[id(q)])
    q.bitwise_xor_(1)
    gc.disable()  # what it holds may be a copy of the weight: it does not wait for a collection
    try:
        int4_linear(x, q, scale, zero, group_size=GROUP)
        assert before() is None
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.parametrize("case", range(3))
def test_threads_and_streams_share_a_launch(case):
    device, k, n = "cuda", 4096, 4096
    call, _, _ = list(products(device, n, k))[case]
    inputs = [torch.randn(m, k, dtype=BF16, device=device) for m in (1, 1, 1, 16, 64, 64, 300, 300)]
    expected = [call(x) for x in inputs]
    torch.cuda.synchronize()
    wrong = []

    def work(x, y):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(200):
                if not torch.equal(call(x), y):
                    wrong.append(tuple(x.shape))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
@pytest.mark.parametrize("case", range(3))
def test_a_thread_that_never_called_cuda_launches(case):
    """As autograd's do: the driver has no current context there."""
    call, _, _ = list(products("cuda"))[case]
    x = torch.randn(3, K, dtype=BF16, device="cuda")
    expected, found = call(x), []
    thread = threading.Thread(target=lambda: found.append(call(x)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", range(3))
def test_no_out_features_give_no_results(case, device):
    call, _, _ = list(products(device, n=0))[case]
    for _ in range(2):  # the second call would find what the first one left
        assert call(torch.randn(3, K, dtype=BF16, device=device)).shape == (3, 0)
