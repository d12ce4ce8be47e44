import re
import xml.etree.ElementTree as ElementTree

import pytest
from lq_eval.plots import INK, LQ_COLOR, OTHER_COLORS, PEER_COLORS, panels, plot_speedup, plot_times
from lq_eval.results import append_record
from lq_formats import FormatError, SpecError

PAGES = {"light": "#ffffff", "dark": "#0d1117"}


def row(m, speedup, kernel="auto", op="int4", n=4096, k=4096, **changes):
    return {
        "op": op,
        "shape": f"{n}x{k}",
        "n": n,
        "k": k,
        "m": m,
        "dtype": "bfloat16",
        "kernel": kernel,
        "speedup": speedup,
        **changes,
    }


@pytest.fixture
def rows():
    """Two shapes, lq and two peers, one of which is not installed."""
    return [
        row(m, factor / m, kernel, n=n)
        for n in (4096, 14336)
        for kernel, factor in (("auto", 3.0), ("humming", 2.0), ("gemlite", None))
        if factor
        for m in (1, 16, 256)
    ] + [row(1, None, "gemlite")]


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_rows_become_panels_by_shape_with_lq_first(rows):
    found = panels(rows)
    assert [panel.title for panel in found] == ["4096x4096, int4", "14336x4096, int4"]
    assert [(series.label, series.ours) for series in found[0].series] == [("lq", True), ("humming", False)]
    assert found[0].series[0].values == {1: 3.0, 16: 3 / 16, 256: 3 / 256}


def test_of_a_repeated_point_the_last_counts_and_points_are_in_order():
    (panel,) = panels([row(16, 1.0), row(1, 2.0), row(16, 3.0, shape="llama-3-8b.q")])
    assert list(panel.series[0].values.items()) == [(1, 2.0), (16, 3.0)]


def test_products_and_shapes_can_be_chosen(rows):
    more = [*rows, row(1, 1.5, op="int8"), row(1, 1.5, op="int8", n=14336)]
    assert [panel.title for panel in panels(more)] == [
        "4096x4096, int4",
        "14336x4096, int4",
        "4096x4096, int8",
        "14336x4096, int8",
    ]
    assert [panel.title for panel in panels(more, ops=("int8",), sizes={(14336, 4096)})] == ["14336x4096, int8"]


def test_dtypes_are_named_where_there_are_several():
    (panel,) = panels([row(1, 1.0), row(1, 2.0, dtype="float16")])
    assert [series.label for series in panel.series] == ["lq bfloat16", "lq float16"]


def test_rows_of_the_ggml_benchmark_are_drawn():
    (panel,) = panels([{"n": 8, "k": 32, "m": 1, "speedup": 2.0}])
    assert (panel.title, panel.series[0].label) == ("8x32, q4_0", "lq")


@pytest.fixture
def steps():
    """What bench ggml writes: times of every step, no kernel; and a row that somebody cites."""
    size = {"n": 4096, "k": 14336}
    ours = [{**size, "m": m, "total_us": 10.0 + m, "dense_us": 30.0 + m, "speedup": 2.0} for m in (1, 8, 64)]
    cited = [{**size, "m": m, "kernel": "llama.cpp (cited)", "total_us": 15.0 + m, "speedup": 1.5} for m in (1, 64)]
    return ours, cited


def test_times_have_the_dense_product_as_a_line(steps):
    ours, cited = steps
    (panel,) = panels([*ours, *cited], times=True, baseline="cuBLAS")
    assert [(one.label, one.ours, one.dense) for one in panel.series] == [
        ("lq", True, False),
        ("llama.cpp (cited)", False, False),
        ("cuBLAS", False, True),
    ]
    lq, llama, dense = (dict(one.values) for one in panel.series)
    assert lq == {1: 11.0, 8: 18.0, 64: 74.0}
    assert llama == {1: 16.0, 64: 79.0}
    assert dense == {1: 31.0, 8: 38.0, 64: 94.0}
    # Nothing is drawn that no row holds.
    assert [one.label for one in panels(ours, times=True)[0].series] == ["lq", "dense"]
    assert [one.label for one in panels(cited, times=True)[0].series] == ["llama.cpp (cited)"]


def test_a_figure_of_times_cites_what_its_files_hold(lq_eval, steps, tmp_path):
    pytest.importorskip("matplotlib")
    ours, cited = tmp_path / "lq.jsonl", tmp_path / "llama-cpp.jsonl"
    append_record(ours, "ggml", steps[0])
    append_record(cited, "ggml", steps[1])
    drawn = {}
    for name, records in (("alone", (ours,)), ("cited", (ours, cited))):
        figure = tmp_path / f"{name}.svg"
        result = lq_eval("bench", "plot", *records, figure, "--times")
        assert result.exit_code == 0, result.output
        root = ElementTree.fromstring(figure.read_text(encoding="utf-8"))
        drawn[name] = {"".join(e.itertext()).strip() for e in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"4096x14336, q4_0", "lq", "dense", "microseconds", "10", "20", "50", "100"} <= drawn["alone"]
    assert drawn["cited"] - drawn["alone"] == {"llama.cpp (cited)"}
    with pytest.raises(SpecError, match="nothing to plot"):
        plot_times([row(1, 2.0)], tmp_path / "none.svg")


def test_every_color_stands_out_from_both_pages():
    for color in (INK, LQ_COLOR, *PEER_COLORS.values(), *OTHER_COLORS):
        for page, background in PAGES.items():
            assert contrast(color, background) >= 3, f"{color} on a {page} page"


def test_the_figure_is_readable_in_both_modes(rows, tmp_path):
    pytest.importorskip("matplotlib")
    target = plot_speedup(rows, tmp_path / "figures" / "speedup.svg", "a GPU", baseline="cuBLAS")
    text = target.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    words = {"".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {
        "a GPU",
        "4096x4096, int4",
        "lq",
        "humming",
        "cuBLAS",
        "speedup over cuBLAS",
        "tokens (M)",
        "1",
        "8",
        "64",
    } <= words
    assert "gemlite" not in words
    # Nothing is painted behind the lines, and nothing in black or white.
    used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", text))
    assert used <= {INK, LQ_COLOR, *PEER_COLORS.values()}, used
    assert {INK, LQ_COLOR, PEER_COLORS["humming"]} <= used
    lines = re.findall(r"stroke: (#[0-9a-f]{6}); stroke-width: ([0-9.]+)", text)
    widths = {color: max(float(width) for c, width in lines if c == color) for color, _ in lines}
    assert widths[LQ_COLOR] > 2 * widths[PEER_COLORS["humming"]]


def test_the_same_records_give_the_same_file(rows, tmp_path):
    pytest.importorskip("matplotlib")
    first, second = (plot_speedup(rows, tmp_path / name) for name in ("a.svg", "b.svg"))
    assert first.read_bytes() == second.read_bytes()


def test_a_figure_needs_rows(rows, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(SpecError, match="nothing to plot"):
        plot_speedup([{"speedup": None}], tmp_path / "empty.png")
    with pytest.raises(SpecError, match="nothing to plot"):
        plot_speedup(rows, tmp_path / "none.png", ops=("int8",))


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        ({"m": 1, "speedup": 2.0}, "a row lacks n, k; it has m, speedup"),
        (row(1, 2.0, n="4096"), "n='4096'; expected a positive integer"),
        (row(0, 2.0), "m=0; expected a positive integer"),
        (row(1, "fast"), "speedup='fast'; expected a number"),
        (row(1, 2.0, dense_us=[1]), r"dense_us=\[1\]; expected a number"),
        (row(10**30, 2.0), r"m=10+; expected a positive integer of at most 63 bits"),
        (row(1, 10**400), r"speedup=10+\.\.\.0+; expected a number"),
        (row(1, 2.0, kernel=["a"]), r"kernel=\['a'\]; expected a text"),
        (row(1, 2.0, dtype=["x"]), r"dtype=\['x'\]; expected a text"),
        (row(1, 2.0, op={"int4": 1}), r"op={'int4': 1}; expected a text"),
        (row(1, 2.0, shape=8), r"shape=8; expected a text"),
    ],
    ids=["sizes", "text", "zero", "speedup", "dense", "m", "large", "kernel", "dtype", "op", "shape"],
)
def test_damaged_rows_are_named_with_their_file(lq_eval, tmp_path, damaged, reason):
    record = tmp_path / "records.jsonl"
    append_record(record, "gemm", [row(1, 2.0), damaged, {"note": "rows without a time need not have sizes"}])
    with pytest.raises(FormatError, match=reason):
        panels([row(1, 2.0), damaged])
    result = lq_eval("bench", "plot", record, tmp_path / "figure.svg")
    assert result.exit_code == 1
    assert re.match(f"lq-eval: FormatError: {record}: .*{reason}", result.stderr)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("speedup.unknown", "end in .svg, .png, .pdf"),
        ("speedup", "end in .svg, .png, .pdf"),
        (".", "end in .svg, .png, .pdf"),
        ("folder.svg", "it is a folder"),
        ("file.txt/speedup.svg", "file.txt' is no folder"),
    ],
)
def test_a_figure_needs_a_known_format_and_a_place(lq_eval, rows, tmp_path, name, reason):
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "file.txt").touch()
    record = tmp_path / "records.jsonl"
    append_record(record, "gemm", rows)
    before = sorted(tmp_path.iterdir())
    for draw in (plot_speedup, plot_times):
        with pytest.raises(SpecError, match=f"cannot write .*{reason}"):
            draw(rows, tmp_path / name)
    for arguments in (("bench", "plot", record, tmp_path / name), ("bench", "gemm", "--plot", tmp_path / name)):
        result = lq_eval(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("lq-eval: SpecError: cannot write ")
        assert reason in result.stderr
        assert result.stdout == ""
    assert sorted(tmp_path.iterdir()) == before


def test_numbers_that_no_int64_holds_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    large = [row(1, 2**70, us=2**70, dense_us=2**71), row(2**63 - 1, 1.5, us=1.5, dense_us=3.0, kernel=None)]
    for draw in (plot_speedup, plot_times):
        assert draw(large, tmp_path / "large.svg").stat().st_size > 0


def test_records_of_several_files_are_drawn_together(lq_eval, rows, tmp_path):
    pytest.importorskip("matplotlib")
    lq, peers = tmp_path / "lq.jsonl", tmp_path / "peers.jsonl"
    append_record(lq, "sweep", [r for r in rows if r["kernel"] == "auto"])
    append_record(lq, "sweep-summary", [{"op": "int4", "shape": "a", "min_speedup": 1.0}])
    append_record(peers, "gemm", [r for r in rows if r["kernel"] != "auto"])
    figure = tmp_path / "speedup.svg"
    result = lq_eval("bench", "plot", lq, peers, figure, "--shapes", "4096x4096", "--ops", "int4")
    assert result.exit_code == 0, result.output
    text = figure.read_text(encoding="utf-8")
    assert "humming" in text
    assert "14336x4096" not in text
