"""Results as tables for people."""

from collections.abc import Iterable, Sequence

from lq_kernels import Explanation
from rich import box
from rich.table import Table
from rich.text import Text

from lq_eval.bench.cold import ColdRow
from lq_eval.bench.eager import EagerRow
from lq_eval.bench.fused import FusedRow
from lq_eval.bench.gemm import GemmRow
from lq_eval.bench.ggml import GGMLRow
from lq_eval.bench.ggml_linear import GGMLLinearRow
from lq_eval.bench.sweep import SweepSummary
from lq_eval.bench.variants import VariantRow
from lq_eval.doctor import Fact
from lq_eval.evaluate import Evaluation
from lq_eval.schemes import MatrixError

_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def _table(title: str, columns: Sequence[str], caption: str = "", left: int = 1) -> Table:
    """Return an empty table whose first ``left`` columns are text and the others numbers; it fits 80 columns if it can."""
    table = Table(
        title=Text(title, style="bold"),
        caption=Text(caption) if caption else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=index == 0, overflow="fold")
    return table


def evaluation_table(rows: Iterable[Evaluation], title: str, caption: str = "") -> Table:
    """Return the table of ``lq-eval demo`` and ``lq-eval ppl``."""
    columns = (
        "scheme",
        "bits/\nweight",
        "layers\nMB",
        "model\nMB",
        "perpl-\nexity",
        "change",
        "KL to\nfloat",
        "same\ntop-1",
        "prefill\ntok/s",
        "decode\ntok/s",
    )
    table = _table(title, columns, caption)
    for row in rows:
        size, distance, decode = row.size, row.divergence, row.decode_tokens_per_second
        table.add_row(
            row.scheme,
            f"{size.bits_per_weight:.3f}",
            f"{size.linear_bytes / 1e6:,.2f}",
            f"{size.total_bytes / 1e6:,.2f}",
            f"{row.perplexity.value:.3f}",
            "" if row.change_percent is None else f"{row.change_percent:+.2f}%",
            "" if distance is None else f"{distance.kl:.4f}",
            "" if distance is None else f"{distance.top1:.1%}",
            f"{row.perplexity.tokens_per_second:,.0f}",
            "" if decode is None else f"{decode:,.0f}",
        )
    return table


def matrix_table(rows: Iterable[MatrixError], title: str) -> Table:
    """Return the table of ``lq-eval schemes``."""
    columns = ("scheme", "scales", "mean abs. error", "relative error", "bits per weight", "reduction")
    table = _table(title, columns, "reduction: bytes of the 16-bit matrix / bytes of codes, scales and zeros", left=2)
    for row in rows:
        table.add_row(
            row.scheme,
            row.scale_dtype,
            f"{row.mae:.4g}",
            f"{row.relative_rmse:.4f}",
            f"{row.bits_per_weight:.4f}",
            f"{row.reduction:.2f}x",
        )
    return table


def gemm_table(rows: Iterable[GemmRow], title: str) -> Table:
    """Return the table of ``lq-eval bench gemm``."""
    columns = ("op", "weight", "kernel", "M", "us", "dense us", "speedup", "GB/s")
    table = _table(title, columns, "dense: F.linear in x's dtype; speedup = dense us / us; M: tokens", left=3)
    for row in rows:
        size = f"{row.n}x{row.k}"
        kernel = row.kernel if row.kernel == row.ran else f"{row.kernel}: {row.ran}"
        table.add_row(
            f"{row.op} {_SHORT.get(row.dtype, row.dtype)}",
            size if row.shape == size else f"{row.shape} {size}",
            Text(f"{row.kernel}: {row.note}" if row.us is None else kernel),
            str(row.m),
            f"{row.us:.1f}" if row.us is not None else "-",
            f"{row.dense_us:.1f}",
            f"{row.speedup:.2f}x" if row.speedup is not None else "-",
            f"{row.gb_per_s:.0f}" if row.gb_per_s is not None else "-",
        )
    return table


def sweep_table(rows: Sequence[SweepSummary], title: str) -> Table:
    """Return the table of ``lq-eval bench sweep``, the worst first."""
    columns = ("op", "weight", "kernel", "points", "failed", "min speedup", "at M", "worst drop", "from M", "to M")
    measured = [row for row in rows if row.min_speedup is not None]
    caption = f"{sum(row.monotone for row in rows)} of {len(rows)} monotone within 8%"
    if measured:
        worst = min(measured, key=_least)
        caption += f"; least speedup {_least(worst):.2f}x ({worst.op}, {worst.shape}, M = {worst.min_m})"
    caption += ". Drop: time at the smaller M over time at the larger, minus one, up to 512 tokens"
    table = _table(title, columns, caption, left=3)
    for row in sorted(rows, key=_least):
        size = f"{row.n}x{row.k}"
        table.add_row(
            f"{row.op} {_SHORT.get(row.dtype, row.dtype)}",
            size if row.shape == size else f"{row.shape} {size}",
            row.min_ran,
            str(row.points),
            str(row.failed),
            "-" if row.min_speedup is None else f"{row.min_speedup:.2f}x",
            "" if row.min_m is None else str(row.min_m),
            Text("-" if row.excess is None else f"{row.excess:.1%}", style="" if row.monotone else "red"),
            *("" if m is None or not row.excess else str(m) for m in (row.slow_m, row.fast_m)),
        )
    return table


def _least(row: SweepSummary) -> float:
    return -1.0 if row.min_speedup is None else row.min_speedup


def variants_table(rows: Iterable[VariantRow], title: str) -> Table:
    """Return the table of ``lq-eval bench variants``."""
    columns = ("variant", "weight", "M", "us", "usual us", "ratio")
    caption = (
        "usual: bf16, symmetric, groups of 128 (int4), one scale a row (int8) or none (dense); ratio = us / usual us"
    )
    table = _table(title, columns, caption, left=2)
    for row in rows:
        group = "" if row.op == "dense" else "row" if row.group_size in (0, row.k) else f"g{row.group_size}"
        parts = (row.op, group, "" if row.symmetric else "asym", _SHORT.get(row.dtype, row.dtype))
        name = " ".join(filter(None, (*parts, "batch-invariant" if row.batch_invariant else "")))
        table.add_row(
            Text(f"{name}: {row.note}" if row.note else name),
            f"{row.n}x{row.k}",
            str(row.m),
            *("-" if value is None else f"{value:.1f}" for value in (row.us, row.usual_us)),
            "-" if row.ratio is None else f"{row.ratio:.2f}x",
        )
    return table


def fused_table(rows: Iterable[FusedRow], title: str) -> Table:
    """Return the table of ``lq-eval bench fused``."""
    columns = ("step", "weights", "way", "M", "us", "gain", "speedup")
    caption = "gain: over the same weights with layers apart; speedup: over the fastest way with dense weights"
    table = _table(title, columns, caption, left=3)
    for row in rows:
        table.add_row(
            Text(f"{row.step} {row.n}x{row.k}: {row.note}" if row.note else f"{row.step} {row.n}x{row.k}"),
            row.op,
            row.way,
            str(row.m),
            "-" if row.us is None else f"{row.us:.1f}",
            *("-" if value is None else f"{value:.2f}x" for value in (row.gain, row.speedup)),
        )
    return table


def eager_table(rows: Iterable[EagerRow], title: str) -> Table:
    """Return the table of ``lq-eval bench eager``."""
    columns = ("call", "weight", "M", "CPU us", "of F.linear")
    table = _table(title, columns, "calls launched back to back, without waiting for the device", left=2)
    for row in rows:
        table.add_row(
            Text(f"{row.call}: {row.note}" if row.note else row.call),
            f"{row.n}x{row.k} {_SHORT.get(row.dtype, row.dtype)}",
            str(row.m),
            "-" if row.cpu_us is None else f"{row.cpu_us:.2f}",
            "-" if row.ratio is None else f"{row.ratio:.2f}x",
        )
    return table


def cold_table(rows: Iterable[ColdRow], title: str) -> Table:
    """Return the table of ``lq-eval bench cold``."""
    columns = (
        *("model", "scheme", "cache", "layers", "quantize s", "warmup s", "compiled s", "CPU s", "again s"),
        *("slowest call ms", "at M"),
    )
    caption = "compiled: until the last kernel was loaded; CPU: of all processors; again: the same warmup once more; "
    caption += "slowest call: of the first calls at other M, after the warmup"
    table = _table(title, columns, caption, left=3)
    for row in rows:
        seconds = (
            f"{value:.3f}" for value in (row.quantize_s, row.warmup_s, row.compile_s, row.warmup_cpu_s, row.rerun_s)
        )
        table.add_row(
            f"{row.shapes} {_SHORT.get(row.dtype, row.dtype)}",
            row.scheme,
            row.cache,
            str(row.layers),
            *seconds,
            f"{row.first_call_s * 1e3:.2f}",
            str(row.first_call_m),
        )
    return table


def ggml_table(rows: Iterable[GGMLRow], title: str) -> Table:
    """Return the table of ``lq-eval bench ggml``."""
    columns = (
        "tokens",
        "quantize us",
        "product us",
        "steps us",
        "total us",
        "linear us",
        "GFLOPS",
        "dense us",
        "speedup",
    )
    caption = "steps: activations to Q8_1, then product; total: both in one call; linear: q4_0_linear; dense: F.linear"
    table = _table(title, columns, caption, left=0)
    for row in rows:
        table.add_row(
            str(row.m),
            f"{row.quantize_us:.1f}",
            f"{row.gemm_us:.1f}",
            f"{row.steps_us:.1f}",
            f"{row.total_us:.1f}",
            f"{row.linear_us:.1f}",
            f"{row.gflops:,.0f}",
            f"{row.dense_us:.1f}",
            f"{row.speedup:.2f}x",
        )
    return table


def ggml_linear_table(rows: Iterable[GGMLLinearRow], title: str) -> Table:
    """Return the table of ``lq-eval bench ggml --types``."""
    columns = ("type", "kernel", "tokens", "us", "layer us", "dequantize us", "dense us", "over dequantize", "speedup")
    caption = "dequantize: to a dense weight, and F.linear; dense: F.linear; both ratios are of their time to us"
    table = _table(title, columns, caption, left=2)
    for row in rows:
        times = (row.us, row.layer_us, row.dequantize_us, row.dense_us)
        table.add_row(
            f"{row.op} {_SHORT.get(row.dtype, row.dtype)}",
            Text(f"{row.ran or row.kernel}: {row.note}" if row.note else row.ran),
            str(row.m),
            *("-" if value is None else f"{value:.1f}" for value in times),
            *("-" if ratio is None else f"{ratio:.2f}x" for ratio in (row.over_dequantize, row.speedup)),
        )
    return table


def facts_table(facts: Iterable[Fact]) -> Table:
    """Return the first table of ``lq-eval doctor``."""
    table = _table("Machine", ("", ""), left=2)
    table.show_header = False
    for fact in facts:
        table.add_row(fact.name, Text(fact.value, style="" if fact.ok else "yellow"))
    return table


def _duration(us: float) -> str:
    return f"{us:.1f} us" if us < 1000 else f"{us / 1000:.1f} ms"


def _reasons(found: Explanation) -> str:
    """Put kernels with the same reason on one line."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in found.rejected:
        by_reason.setdefault(reason, []).append(name)
    return "\n".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())


def kernel_table(explanations: Iterable[Explanation]) -> Table:
    """Return the second table of ``lq-eval doctor``."""
    columns = ("product", "M", "kernel", "predicted", "why not the others")
    table = _table("Kernels for a 4096x4096 layer, M tokens at a time", columns, left=5)
    for found in explanations:
        problem = found.problem
        spec = problem.spec
        group = "row" if spec.granularity == "row" else f"g{problem.group_size}"
        dtype = str(problem.dtype).removeprefix("torch.")
        table.add_row(
            f"{problem.op} {group} {'sym' if spec.symmetric else 'asym'} {_SHORT.get(dtype, dtype)}",
            str(problem.m),
            found.chosen or Text("none", style="red"),
            _duration(found.predicted_us) if found.chosen else "",
            Text(_reasons(found)),
            end_section=problem.m == 4096,
        )
    return table
