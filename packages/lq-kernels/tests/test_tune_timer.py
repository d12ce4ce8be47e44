"""What the timing process of the tuner multiplies, and which of its times count."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from lq_kernels.tuned.kernels import TUNABLES, weight


@pytest.mark.parametrize(
    "each",
    [
        weight(4, 128, 100, 256),
        weight(4, 32, 2048, 8192, symmetric=False),
        weight(4, -1, 64, 136),
        weight(8, -1, 64, 256),
        weight(4, 32, 48, 256, activation="q8_1"),
    ],
    ids=str,
)
def test_operands_are_weights_in_fragment_order(each, monkeypatch):
    from lq_kernels.cuda import decode_a16, prefill_a16, quantize_q8_1
    from lq_kernels.preshuffled import preshuffled_linear
    from lq_kernels.tuned import timer

    def linear(x, packed, scale, zero, bias, out_features, group_size, bits, config, transposed):
        y = preshuffled_linear(x, packed, scale, zero, bits=bits, group_size=group_size, out_features=out_features)
        return y.t().float() if transposed else y

    monkeypatch.setattr(decode_a16, "linear", linear)
    monkeypatch.setattr(prefill_a16, "linear", linear)
    rounded, quantized = [], []
    monkeypatch.setattr(quantize_q8_1, "round_q8_1", lambda x: rounded.append(x) or x)

    def linear_q8_1(x, packed, scale, out_features, config):
        quantized.append(x)
        return linear(x, packed, scale, None, None, out_features, 32, 4, config, True)

    monkeypatch.setattr(decode_a16, "linear_q8_1", linear_q8_1)
    make = timer._q8_1_calls if each.activation else timer._a16_calls
    calls = make(each, torch.device("cpu"), torch.Generator().manual_seed(0))
    kernels = {kernel for kernel, tunable in TUNABLES.items() if tunable.useful(each, 128)}
    assert set(calls) == {"expected", *kernels}
    x = torch.randn(3, each.k, dtype=torch.bfloat16)
    results = [call(x, None) for call in calls.values()]
    assert results[0].shape == ((each.n, 3) if each.activation else (3, each.n))
    assert (len(rounded), len(quantized)) == ((len(calls) - 1, 1) if each.activation else (0, 0))
    assert not any(timer._difference(y, results[0]) for y in results)
    assert "is wrong by" in timer._difference(results[0] * 1.2, results[0])
    assert "finite" in timer._difference(results[0] / 0, results[0])


@pytest.mark.parametrize(
    "each", [weight(b, 128, 48, 256, activation=a) for b in (4, 8) for a in ("int8", "fp8")], ids=str
)
def test_operands_for_8_bit_tokens(each, monkeypatch):
    from lq_kernels import int4_dynamic_linear, int8_dynamic_linear
    from lq_kernels.cuda import linear_a8
    from lq_kernels.tuned import timer

    def linear(codes, token_scale, weight, scale, bias, out_features, group_size, dtype, *, lowest, config):
        x = (codes.float() * token_scale[:, None]).to(dtype)
        if each.bits == 8:
            return int8_dynamic_linear(x, weight, scale)
        sizes = {"group_size": group_size, "out_features": out_features, "activation": each.activation}
        return int4_dynamic_linear(x, weight, scale, lowest=lowest, **sizes)

    monkeypatch.setattr(linear_a8, "linear", linear)
    calls = timer._a8_calls(each, torch.device("cpu"), torch.Generator().manual_seed(0))
    x = torch.randn(5, each.k, dtype=torch.bfloat16)
    y = calls["linear_a8"](x, None)
    assert y.shape == (5, each.n)
    assert not timer._difference(y, calls["expected"](x, None))


class Clock:
    """A GPU whose clock falls 80 ms after a pause, by as much as a graph takes power; time passes in replays alone."""

    def __init__(self):
        self.s = 0.0
        self.busy_since = 0.0
        self.replayed = []

    def graph(self, name, us, power):
        def replay():
            self.replayed.append(name)
            self.s += us * 1e-6 * (power if self.s - self.busy_since > 0.08 else 1.0)

        return SimpleNamespace(replay=replay)

    def pause(self, cycles=None):
        self.s += 1e-3
        self.busy_since = self.s

    def event(self):
        found = SimpleNamespace(s=0.0, synchronize=lambda: None)
        found.record = lambda: setattr(found, "s", self.s)
        found.elapsed_time = lambda other: (other.s - found.s) * 1e3
        return found


@pytest.fixture
def timed(monkeypatch):
    """Return a function from tokens and replays to the times of two cuts, thrifty (40 us) and hungry (30), and the clock."""
    from lq_kernels.tuned import replays, timer

    clock, graphs = Clock(), {"thrifty": (4e3, 1.1), "hungry": (3e3, 2.0)}  # 100 calls each
    each = weight(4, 128, 4096, 4096)
    self = object.__new__(timer.GraphTimer)
    self._device, self._sm_count, self._stream = torch.device("cpu"), 132, None
    copies = [dict.fromkeys(("expected", *graphs), lambda x, config: torch.ones(1)) for _ in range(100)]
    monkeypatch.setattr(self, "_prepare", lambda weight: copies)
    monkeypatch.setattr(timer, "config_of", lambda *each: None)
    # The copies' calls, bound to a kernel's name by the order in which graphs are captured.
    names = iter(graphs)
    monkeypatch.setattr(timer, "_capture", lambda calls, count, stream: clock.graph(name := next(names), *graphs[name]))
    for module in (timer, replays):
        monkeypatch.setattr(module, "event", clock.event)
    monkeypatch.setattr(timer.torch.cuda, "_sleep", clock.pause)
    monkeypatch.setattr(timer.torch.cuda, "synchronize", lambda *device: None)
    monkeypatch.setattr(timer.time, "perf_counter", lambda: clock.s)

    def times(m, replays):
        return self.times(each, m, [(name, ()) for name in graphs], replays)

    return times, clock


def test_cuts_for_few_tokens_are_timed_with_pauses_and_in_turn(timed):
    times, clock = timed
    assert times(255, 9) == pytest.approx([40.0, 30.0])
    assert clock.replayed == ["thrifty", "hungry"] * 9


def test_many_tokens_are_looked_at_in_turn_when_the_gpu_is_hot(timed):
    times, clock = timed
    times(256, 3)
    assert clock.replayed[-6:] == ["thrifty", "hungry"] * 3
    assert len(clock.replayed) > 20  # most of them before


def test_finalists_for_many_tokens_run_by_themselves_until_the_clock_is_theirs(timed):
    times, clock = timed
    # The hungry one is faster for 80 ms only.
    assert times(256, 4) == pytest.approx([44.0, 60.0])
    switches = [a != b for a, b in itertools.pairwise(clock.replayed)]
    assert sum(switches) == 1
