"""Makes Triton's interpreter (TRITON_INTERPRET=1) right for bfloat16.

The stock interpreter keeps bfloat16 as raw 16-bit integers: it truncates where a GPU rounds to nearest even, and it
adds, compares and multiplies the integers. The kernels here only ever convert bfloat16 (load, to float32, compute,
round at the store), so the repair is the two conversions, and arithmetic on bfloat16 raises instead of lying.

Integer arguments from 2^31 to 2^32 - 1 are held in 32 bits under the name of int64, and then wrap: repaired too. And
calls of device functions are made several times cheaper.
"""

from __future__ import annotations

from typing import Any

import numpy as np

KNOWN = ("3.9.",)  # versions whose interpreter was read and checked against torch, bit for bit


def widen(u: np.ndarray) -> np.ndarray:
    """Bits of bfloat16 (uint16) to float32."""
    return (np.ascontiguousarray(u).astype(np.uint32) << 16).view(np.float32).reshape(np.shape(u))


def narrow(f: np.ndarray) -> np.ndarray:
    """float32 to bits of bfloat16 (uint16), to nearest even; NaN stays NaN."""
    f = np.ascontiguousarray(f, dtype=np.float32)
    u = f.view(np.uint32)
    rounded = ((u + (np.uint32(0x7FFF) + ((u >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(f), np.uint16(0x7FC0), rounded).reshape(f.shape)


def repair() -> None:
    """Patches the interpreter of this process, once; raises RuntimeError for a Triton it does not know."""
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "fastmerge_repaired"):
        return
    if not triton.__version__.startswith(KNOWN):
        raise RuntimeError(
            f"TRITON_INTERPRET=1 with Triton {triton.__version__}: its interpreter is wrong for bfloat16 and the "
            f"repair in fastmerge knows only {', '.join(v + 'x' for v in KNOWN)}; install such a version"
        )
    handle, cast = interpreter.TensorHandle, builder.cast_impl

    def is_bf16(h: Any) -> bool:
        return bool(h.dtype.scalar == tl.bfloat16)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        to = dst_type.scalar
        if is_bf16(src) and to != tl.bfloat16:
            src = handle(widen(src.data), tl.float32)
            return src if to == tl.float32 else cast(self, src, dst_type)
        if to == tl.bfloat16 and not is_bf16(src):
            src = src if src.dtype.scalar == tl.float32 else cast(self, src, tl.float32)
            return handle(narrow(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    builder.cast_impl = cast_impl
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(builder, f"create_{name}", cast_impl)
    fp_to_fp = builder.create_fp_to_fp

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding: Any) -> Any:
        nearest = rounding is None or rounding == interpreter._ir.ROUNDING_MODE.RTNE
        if nearest and (is_bf16(src) or dst_type.scalar == tl.bfloat16):
            return cast_impl(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding)

    builder.create_fp_to_fp = create_fp_to_fp

    def refuse(original: Any, *operands: int) -> Any:
        def run(self: Any, *args: Any) -> Any:
            if any(is_bf16(args[i]) for i in operands):
                raise TypeError("arithmetic on bfloat16 in a kernel: convert to float32 after the load")
            return original(self, *args)

        return run

    convert = interpreter._implicit_cvt

    def implicit_cvt(arg: Any) -> Any:
        if isinstance(arg, int) and not isinstance(arg, bool) and 1 << 31 <= arg < 1 << 32:
            return tl.tensor(handle(np.array([arg], dtype=np.int64), tl.int64), tl.int64)
        return convert(arg)

    interpreter._implicit_cvt = implicit_cvt
    patch_lang = interpreter._patch_lang

    def patch_lang_once(fn: Any) -> Any:
        # Every call of a device function would search all of triton.language again for what is patched already.
        modules = {id(v): v for v in fn.__globals__.values() if v is tl or v is tl.core}
        fresh = any(tl.core.is_builtin(m.load) for m in modules.values())
        return patch_lang(fn) if fresh else interpreter._LangPatchScope()

    interpreter._patch_lang = patch_lang_once

    bitwise = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)
    binary = builder.binary_op

    def binary_op(self: Any, lhs: Any, rhs: Any, operation: Any) -> Any:
        if operation not in bitwise and (is_bf16(lhs) or is_bf16(rhs)):
            raise TypeError("arithmetic on bfloat16 in a kernel: convert to float32 after the load")
        return binary(self, lhs, rhs, operation)

    builder.binary_op = binary_op
    builder.unary_op = refuse(builder.unary_op, 0)
    builder.create_fma = refuse(builder.create_fma, 0, 1, 2)
    builder.create_dot = refuse(builder.create_dot, 0, 1)
    builder.fastmerge_repaired = True
