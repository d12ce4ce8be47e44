"""Cuts of products with tokens that are quantized like Q8_1 blocks, in the launch before or by the product itself."""

import pytest
import torch
from lq_formats import DTypeError, SpecError, quantize_q4_0, quantize_q8_1
from lq_kernels import Arch, Problem, plans, q4_0
from lq_kernels.cuda import constraints, decode_a16, decode_cuts
from lq_kernels.cuda.variant import Scales
from lq_kernels.tuned import lookup
from lq_kernels.tuned.kernels import TUNABLES, fields_of, weight
from lq_kernels.tuned.lookup import source_digests, user_path
from lq_kernels.tuned.table import Point, Stamp, Table, write

H200 = Arch("cuda", (9, 0), "NVIDIA H200", 132)
STAMP = Stamp("NVIDIA H200", 132, "0.1.0", "2.11.0", "CUDA 13.0", "2026-11-22")
Q4_0 = weight(4, 32, 4096, 14336)
BEHIND = weight(4, 32, 4096, 14336, activation="q8_1")
Q4_0_SIZES = (256, 14336, 4, Scales(4, False, False, 128), 132, H200.name)


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch):
    """No tables but the user's; kernels are planned as if a compiler were there."""
    monkeypatch.setenv("LQ_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LQ_DISABLE_CACHE", raising=False)
    monkeypatch.setattr(lookup, "SHIPPED_FOLDER", tmp_path / "shipped")
    monkeypatch.setattr(constraints, "why_not_compile", lambda: None)
    lookup.forget()
    yield
    lookup.forget()


def save(*points):
    found = Table(STAMP)
    for kernel, each, point in points:
        found = found.merged(STAMP, kernel, source_digests()[kernel], each, point)
    write(found, user_path(H200.name))
    lookup.forget()


def decode_cut(each, m, **fields):
    """The first cut that has these fields."""
    ranked = TUNABLES["decode_a16"].ranked(each, m, 132)
    return next(cut for cut in ranked if all(getattr(cut, name) == value for name, value in fields.items()))


def test_what_stands_behind_a_launch_is_as_it_was_measured_there():
    deep = decode_cut(BEHIND, 2, streamed=True, stages=8)
    by_itself = decode_cut(Q4_0, 2, streamed=True, stages=4, clusters=64)
    tiles = fields_of(TUNABLES["prefill_a16"].ranked(BEHIND, 2, 132)[1])
    by_itself_alone = ("decode_a16", Q4_0, Point(2, 10.5, fields_of(by_itself)))
    save(
        by_itself_alone,
        ("decode_a16", BEHIND, Point(2, 11.25, fields_of(deep))),
        ("prefill_a16", BEHIND, Point(2, 17.0, tiles)),
    )
    assert decode_a16.choice(2, *Q4_0_SIZES).config == by_itself
    chosen = decode_a16.choice(2, *Q4_0_SIZES, q8_1=True)
    assert (chosen.config, chosen.measured.point.us) == (deep, 11.25)
    # ... and so it is planned, and launched.
    asked = Problem("q4_0_q8_1", 2, 4096, 14336, q4_0.spec(14336), torch.float32, H200)
    of_decode, of_prefill = (
        q4_0.OnQ4_0("", plan, lambda problem: None).plan(asked) for plan in (plans.decode, plans.prefill)
    )
    assert (of_decode.us, of_decode.cut, of_prefill.us) == (11.25, str(deep), 17.0)
    with_16_bits = Problem("q4_0", 2, 4096, 14336, q4_0.spec(14336), torch.bfloat16, H200)
    assert q4_0.OnQ4_0("", plans.decode, lambda problem: None).plan(with_16_bits).us == 10.5
    # Where nothing was, what is fastest by itself has a multiprocessor for each CTA, and room for int8 where it had 16 bits.
    save(by_itself_alone)
    config = decode_a16.choice(2, *Q4_0_SIZES, q8_1=True, quantizes=False).config
    assert all(getattr(config, name) == getattr(by_itself, name) for name in decode_cuts.SAME)
    assert config.pitch == by_itself.pitch // 256 * 144
    assert config == decode_cuts.alone(config, 2, 132)


def test_few_numbers_are_quantized_where_they_are_multiplied():
    sizes = (256, 4096, *Q4_0_SIZES[2:])
    assert decode_a16.choice(4, *sizes, q8_1=True).config.quantizes
    for m, each, options in ((4, sizes, {"quantizes": False}), (5, sizes, {}), (4, Q4_0_SIZES, {})):
        assert not decode_a16.choice(m, *each, q8_1=True, **options).config.quantizes
    # What was measured comes first, and what is not for blocks has a twin.
    here, there = (decode_cut(BEHIND, 2, quantizes=each, streamed=False) for each in (True, False))
    save(("decode_a16", BEHIND, Point(2, 10.0, fields_of(here))))
    assert decode_a16.choice(2, *Q4_0_SIZES, q8_1=True).config == here
    of_blocks = decode_a16.choice(2, *Q4_0_SIZES, q8_1=True, quantizes=False).config
    assert {name for name in decode_cuts.SAME if getattr(of_blocks, name) != getattr(here, name)} <= {
        "quantizes",
        "stages",
    }
    assert not of_blocks.quantizes
    save(("decode_a16", BEHIND, Point(2, 10.0, fields_of(there))))
    assert decode_a16.choice(2, *Q4_0_SIZES, q8_1=True).config == there


def test_tokens_that_are_added_up_take_the_measured_cut_otherwise():
    # Minima multiply sums of tokens, so these stay where they are; a table tells nothing of them but the bytes of their weight.
    sizes = (256, 14336, 4, Scales(4, True, True, 256), 132, H200.name)
    asymmetric = weight(4, 32, 4096, 14336, symmetric=False)
    streamed = decode_cut(Q4_0, 1, streamed=True, stages=6, clusters=64)
    save(("decode_a16", asymmetric, Point(1, 10.5, fields_of(streamed))))
    chosen = decode_a16.choice(1, *sizes)
    assert not chosen.config.streamed
    assert chosen.config.stages <= streamed.stages
    for name in ("token_tiles", "warp_blocks", "ctas", "cluster", "clusters"):
        assert getattr(chosen.config, name) == getattr(streamed, name)
    assert chosen.measured.point.us == 10.5
    many = tuple(sorted({**dict(fields_of(streamed)), "stages": 1 << 30}.items()))
    save(("decode_a16", asymmetric, Point(1, 9.5, many)))
    assert decode_a16.choice(1, *sizes).config.stages <= 16, "whatever a file says"
    save()
    assert not decode_a16.choice(1, *sizes).config.streamed


def test_blocks_are_not_quantized_again():
    w = quantize_q4_0(torch.randn(16, 256))
    config = decode_cut(weight(4, 32, 16, 256, activation="q8_1"), 1, quantizes=True)
    with pytest.raises(DTypeError, match="Q8_1 blocks, which nobody quantizes; pass a config that does not"):
        decode_a16.linear_q8_1(quantize_q8_1(torch.randn(1, 256)), q4_0.pack_codes(w), q4_0.pack_scales(w), 16, config)


@pytest.mark.parametrize("form", [{"bits": 8, "group_size": -1}, {"bits": 4, "group_size": 128}])
def test_only_q4_0_stands_behind_a_launch(form):
    with pytest.raises(SpecError, match="q8_1: 4 bits in groups of 32"):
        weight(n=64, k=256, activation="q8_1", **form)
