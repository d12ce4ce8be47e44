"""Cuts of products behind the launch that rounds their tokens, and with tokens that become something else where they stay."""

import pytest
import torch
from lq_formats import ShapeError, SpecError, quantize_q4_0, quantize_q8_1
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
    chosen = decode_a16.choice(2, *Q4_0_SIZES, behind=True)
    assert (chosen.config, chosen.measured.point.us) == (deep, 11.25)
    # ... and so it is planned, and launched.
    asked = Problem("q4_0_q8_1", 2, 4096, 14336, q4_0.spec(14336), torch.float32, H200)
    of_decode, of_prefill = (
        q4_0.OnQ4_0("", plan, lambda problem: None).plan(asked) for plan in (plans.decode, plans.prefill)
    )
    assert (of_decode.us, of_decode.cut, of_prefill.us) == (11.25, str(deep), 17.0)
    with_16_bits = Problem("q4_0", 2, 4096, 14336, q4_0.spec(14336), torch.bfloat16, H200)
    assert q4_0.OnQ4_0("", plans.decode, lambda problem: None).plan(with_16_bits).us == 10.5
    # Where nothing was, what is fastest by itself has a multiprocessor for each CTA.
    save(by_itself_alone)
    assert decode_a16.choice(2, *Q4_0_SIZES, behind=True).config == decode_cuts.alone(by_itself, 2, 132)


def test_tokens_that_have_to_stay_take_the_measured_cut_otherwise():
    streamed = decode_cut(Q4_0, 1, streamed=True, stages=6, clusters=64)
    save(("decode_a16", Q4_0, Point(1, 9.5, fields_of(streamed))))
    config = decode_a16.choice(1, *Q4_0_SIZES, streamed=False).config
    assert not config.streamed
    assert config.stages <= streamed.stages
    for name in ("token_tiles", "warp_blocks", "ctas", "cluster", "clusters"):
        assert getattr(config, name) == getattr(streamed, name)
    # Minima multiply sums of tokens, so these stay as well; a table tells nothing of them but the bytes of their weight.
    asymmetric = weight(4, 32, 4096, 14336, symmetric=False)
    save(("decode_a16", asymmetric, Point(1, 10.5, fields_of(streamed))))
    chosen = decode_a16.choice(1, 256, 14336, 4, Scales(4, True, True, 256), 132, H200.name)
    assert not chosen.config.streamed
    assert (chosen.config.clusters, chosen.measured.point.us) == (streamed.clusters, 10.5)
    many = tuple(sorted({**dict(fields_of(streamed)), "stages": 1 << 30}.items()))
    save(("decode_a16", Q4_0, Point(1, 9.5, many)))
    assert decode_a16.choice(1, *Q4_0_SIZES, streamed=False).config.stages <= 16, "whatever a file says"
    stays = decode_cut(Q4_0, 1, streamed=False, stages=3, clusters=132)
    save(("decode_a16", Q4_0, Point(1, 9.5, fields_of(stays))))
    assert decode_a16.choice(1, *Q4_0_SIZES, streamed=False).config == stays
    save()
    assert not decode_a16.choice(1, *Q4_0_SIZES, streamed=False).config.streamed


@pytest.mark.parametrize("read", [True, False])
def test_they_do_not_pass_by(read):
    w = quantize_q4_0(torch.randn(16, 256))
    config = decode_cut(weight(4, 32, 16, 256), 1, streamed=True)
    run, tokens = (
        (decode_a16.linear_q8_1, quantize_q8_1) if read else (decode_a16.linear_rounding, torch.Tensor.bfloat16)
    )
    with pytest.raises(ShapeError, match="pass a config that is not streamed"):
        run(tokens(torch.randn(1, 256)), q4_0.pack_codes(w), q4_0.pack_scales(w), 16, config)


@pytest.mark.parametrize("form", [{"bits": 8, "group_size": -1}, {"bits": 4, "group_size": 128}])
def test_only_q4_0_stands_behind_a_launch(form):
    with pytest.raises(SpecError, match="q8_1: 4 bits in groups of 32"):
        weight(n=64, k=256, activation="q8_1", **form)
