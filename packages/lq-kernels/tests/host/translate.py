"""CUDA sources of this package to C++ that runs on the host: the preprocessor's output, each ``asm`` made a function call.

Everything else stays as it is, so that what runs is the source: its arithmetic of indices, its barriers and its order.
"""

import re
from collections.abc import Iterator

PTX = {
    "": "nothing",
    "add.rn.bf16x2 %0, %1, %2;": "add_bf16x2",
    "add.rn.f16x2 %0, %1, %2;": "add_f16x2",
    "add.rz.f32 %0, %1, %2;": "add_rz_f32",
    "atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;": "atom_add",
    "bar.arrive %0, %1;": "barrier_arrive",
    "bar.sync %0, %1;": "barrier_all_of_id",
    "bar.sync 15, %0;": "barrier_15",
    "barrier.cluster.arrive.relaxed.aligned;": "cluster_arrive",
    "barrier.cluster.wait.acquire.aligned;": "cluster_wait",
    "cp.async.bulk.commit_group;": "bulk_commit",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;": "bulk_copy",
    "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];": "tensor_store",
    "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
    "[%0], [%1, {%2, %3}], [%4], %5;": "tensor_copy",
    "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
    "[%0], [%1, {%2, %3}], [%4], %5, %6;": "tensor_copy_multicast",
    "cp.async.bulk.wait_group.read %0;": "bulk_wait_read",
    "cp.async.cg.shared.global [%0], [%1], 16, %2;": "cp_async_16",
    "cp.async.commit_group;": "cp_async_commit",
    "cp.async.wait_group %0;": "cp_async_wait",
    "createpolicy.fractional.L2::evict_first.b64 %0, 1.0;": "create_policy",
    "createpolicy.fractional.L2::evict_last.b64 %0, 1.0;": "create_policy",
    "createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;": "create_policy",
    "cvt.f32.f16 %0, %1;": "cvt_f32_f16",
    "cvt.rn.bf16.f32 %0, %1;": "cvt_bf16_f32",
    "cvt.rn.bf16x2.f32 %0, %1, %2;": "cvt_bf16x2_f32",
    "cvt.rn.f16.f32 %0, %1;": "cvt_f16_f32",
    "cvt.rn.f16x2.f32 %0, %1, %2;": "cvt_f16x2_f32",
    "cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;": "cvt_e4m3x2_f32",
    "cvt.rna.tf32.f32 %0, %1;": "cvt_tf32_f32",
    "fence.mbarrier_init.release.cluster;": "nothing",
    "fence.proxy.async.shared::cta;": "nothing",
    "fma.rn.bf16x2 %0, %1, %2, %3;": "fma_bf16x2",
    "fma.rn.f16x2 %0, %1, %2, %3;": "fma_f16x2",
    "griddepcontrol.launch_dependents;": "nothing",
    "griddepcontrol.wait;": "nothing",
    "ld.shared.f32 %0, [%1];": "ld_shared_f32",
    "ld.shared.u32 %0, [%1];": "ld_shared_u32",
    "ld.shared.v2.f32 {%0, %1}, [%2];": "ld_shared_v2_f32",
    "ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];": "ld_shared_v4_u32",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];": "ldmatrix_x4",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];": "ldmatrix_x4_trans",
    "lop3.b32 %0, %1, %2, %3, 0x6a;": "lop3_and_xor",
    "lop3.b32 %0, %1, %2, %3, 0xea;": "lop3_and_or",
    "mapa.shared::cluster.u32 %0, %1, %2;": "mapa",
    "max.u16x2 %0, %1, %2;": "max_u16x2",
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;": "mbarrier_arrive_expect",
    "mbarrier.arrive.shared::cta.b64 _, [%0];": "mbarrier_arrive",
    "mbarrier.init.shared::cta.b64 [%0], %1;": "mbarrier_init",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
    "{%0,%1,%2,%3};": "mma_k16<::host::Type::kBf16>",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
    "{%10,%10,%10,%10};": "mma_k16_of<::host::Type::kBf16>",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
    "{%0,%1,%2,%3};": "mma_k16<::host::Type::kF16>",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
    "{%10,%10,%10,%10};": "mma_k16_of<::host::Type::kF16>",
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};": "mma_s8",
    "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};": "mma_tf32_k4",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%8}, {%0,%1,%2,%3};": "mma_tf32_k8",
    "mov.u32 %0, %%clock;": "clock_now",
    "mov.u32 %0, %%cluster_ctarank;": "cluster_ctarank",
    "mov.u32 %0, %%cluster_nctarank;": "cluster_nctarank",
    "mul.rn.bf16x2 %0, %1, %2;": "mul_bf16x2",
    "mul.rn.f16x2 %0, %1, %2;": "mul_f16x2",
    "nanosleep.u32 1000000;": "nothing",
    "prefetch.tensormap [%0];": "nothing",
    "prmt.b32 %0, %1, %2, %3;": "prmt",
    "setmaxnreg.dec.sync.aligned.u32 %0;": "nothing",
    "setmaxnreg.inc.sync.aligned.u32 %0;": "nothing",
    "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];": "st_async_v2",
    "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];": "st_async_v4",
    "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};": "stmatrix_x2_trans",
    "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};": "stmatrix_x4_trans",
    "sub.rn.f16x2 %0, %1, %2;": "sub_f16x2",
    "wgmma.commit_group.sync.aligned;": "wgmma_commit",
    "wgmma.fence.sync.aligned;": "wgmma_fence",
    "wgmma.wait_group.sync.aligned %0;": "wgmma_wait",
    "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
    "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote]; }": "mbarrier_arrive_remote",
    "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
    "mbarrier.arrive.shared::cluster.b64 _, [remote]; }": "mbarrier_arrive_remote",
    "{ .reg .pred done; wait_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra "
    "wait_%=; }": "mbarrier_wait",
    "{ .reg .pred done; wait_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @done bra over_%=; "
    "nanosleep.u32 20000; bra wait_%=; over_%=: }": "mbarrier_wait",
    "{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }": "elect_sync",
}  # fmt: skip
"""Functions of ``device.h`` by what they stand for: outputs come first, then inputs, as in the ``asm``."""

_WGMMA = re.compile(
    r"\{ \.reg \.pred add; setp\.ne\.s32 add, %\d+, 0; wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k\d+\.(?:f32|s32)\.(\w+)\.\2 "
    r"\{[%\d,]+\}, (\{?)%.*; \}"
)
_TYPES = {"bf16": "kBf16", "f16": "kF16", "s8": "kS8", "e4m3": "kE4m3"}
_ASM = re.compile(r"\basm\b\s*(?:volatile)?\s*\(")
_KERNEL = re.compile(
    r'extern "C" __global__ void __launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*(?:__cluster_dims__\([^()]*\)\s*)?'
    r"(\w+)\(([^)]*)\)\s*\{"
)


def translate(text: str) -> str:
    """Return C++ of a preprocessed CUDA source, with a function ``host_KERNEL(const long long*)`` for each kernel.

    Raises:
        KeyError: If there is an instruction that has no function; the key is its text.
    """
    text = re.sub(r"^\s*#pragma.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"extern __shared__ __align__\(\d+\) u8 (\w+)\[\];", r"u8* const \1 = ::host::shared_memory();", text)
    text = text.replace("__shared__", "static")  # CTAs of kernels that have such arrays run one after the other
    parts, end = [], 0
    for start, stop, call in _calls(text):
        parts += [text[end:start], call]
        end = stop
    entries = [_entry(*match.groups()) for match in _KERNEL.finditer(text)]
    return '#include "device.h"\n' + "".join([*parts, text[end:], *entries])


def _calls(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield where each ``asm`` begins and ends, and the call that takes its place."""
    for match in _ASM.finditer(text):
        sections, end = _sections(text, match.end())
        template = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', sections[0])).replace("\\n", " ")
        operands = [_operands(section) for section in sections[1:3]]
        yield (
            match.start(),
            end,
            _call(re.sub(r"\s+", " ", template).strip(), *operands, *([] for _ in range(2 - len(operands)))),
        )


def _call(template: str, outputs: list[str], inputs: list[str]) -> str:
    wgmma = _WGMMA.fullmatch(template)
    if wgmma is None:
        return f"::host::{PTX[template]}({', '.join([*outputs, *inputs])})"
    columns, dtype, registers = wgmma.groups()
    a = f"&{inputs[0]}, 0" if registers else f"nullptr, {inputs[0]}"
    return f"::host::wgmma(::host::Type::{_TYPES[dtype]}, {columns}, &{outputs[0]}, {a}, {inputs[-2]}, {inputs[-1]})"


def _sections(text: str, at: int) -> tuple[list[str], int]:
    """Return what colons separate in the parentheses that open before ``at``, and where these end."""
    sections, depth, begin, quoted = [], 1, at, False
    while True:
        c = text[at]
        if quoted:
            at += c == "\\"
            quoted = c != '"'
        elif c == '"':
            quoted = True
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
            if depth == 0:
                return [*sections, text[begin:at]], at + 1
        elif c == ":" and depth == 1:
            sections.append(text[begin:at])
            begin = at + 1
        at += 1


def _operands(section: str) -> list[str]:
    """Return the expressions of operands, each in parentheses."""
    found, at = [], 0
    while (match := re.compile(r'\s*,?\s*"[=+]?[a-z]"\s*\(').match(section, at)) is not None:
        _, at = _sections(section, match.end())
        found.append(section[match.end() - 1 : at])
    return found


def _entry(name: str, parameters: str) -> str:
    arguments = []
    for i, parameter in enumerate(parameters.split(",")):
        kind = re.sub(r"\b(__grid_constant__|const(?= __grid))\b", "", parameter.strip().rsplit(None, 1)[0]).strip()
        by_value = kind.split()[-1] == "TensorMap"
        arguments.append(f"*reinterpret_cast<const {kind.split()[-1]}*>(a[{i}])" if by_value else f"({kind})(a[{i}])")
    return f'\nextern "C" void host_{name}(const long long* a) {{ {name}({", ".join(arguments)}); }}\n'
