"""Stage 2, kernels: what two or more kernel files share.

`INTERPRET` is fixed when Triton is imported: with TRITON_INTERPRET=1 every `@triton.jit` function
becomes a NumPy program that runs on CPU tensors, which is how the tests run without a GPU.
"""

import functools

import torch
import triton
import triton.language as tl
from triton import knobs

from ._configs import choose_config

INTERPRET = knobs.runtime.interpret

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_device(op: str, tensor: torch.Tensor) -> None:
    """Refuse tensors that no compiled kernel can read, instead of computing them some other way."""
    if tensor.device.type == "cuda" or INTERPRET:
        return
    raise ValueError(
        f"{op}: expected tensors on a CUDA or ROCm device, got {tensor.device}. "
        f"Use {op}_ref on this device, or set TRITON_INTERPRET=1 before triton is imported "
        "to run the kernel in Triton's interpreter (slow, for tests)"
    )


@functools.cache
def arch_of(device: torch.device) -> str:
    """The chip a kernel is built for: "sm_90", "gfx942", or "cpu" under the interpreter."""
    if device.type == "cpu":
        return "cpu"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def config_of(kind, op, ints, shape, dtype, device):
    """The `kind` of config that the caller gave as integers, or else the choice for this chip."""
    if ints:
        return kind.from_ints(ints)
    return choose_config(op, shape, dtype, arch_of(device))


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """[*, n] -> [T, n]; a plain reshape(-1, n) refuses n = 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def product(left, right, bias=None):
    """left right + bias [N, M], in the dtype of left: autocast, which would round the operands of a
    product, leaves one into a given tensor alone."""
    out = left.new_empty(left.shape[0], right.shape[1])
    if bias is None:
        return torch.mm(left, right, out=out)
    return torch.addmm(bias, left, right, out=out)


def expect(name, tensor, shape, dtypes, like, of="x"):
    """ValueError unless a tensor is None, or of this shape, a dtype of these, and like's device.

    of: what the messages call `like`.
    """
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    if tensor.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        raise ValueError(f"{name}: expected dtype {expected}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} (that of {of}), got {tensor.device}"
        )


def expect_operand(name, x):
    """ValueError unless x is fp32, bf16 or fp16 and has a last dimension."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: expected dtype float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError(f"{name}: expected at least one dimension, got a scalar")


def expect_matrix(name, w):
    """ValueError unless w has two dimensions; gives its sizes."""
    if w.dim() != 2:
        raise ValueError(f"{name}: expected two dimensions, got shape {tuple(w.shape)}")
    return tuple(w.shape)


def refuse_second_derivative(op: str):
    """A backward for register_autograd of an op that is itself a backward: it says so and stops."""

    def backward(ctx, *_):
        raise RuntimeError(
            f"{op} has no second derivative: its backward cannot be differentiated. Drop "
            f"create_graph=True, or use {op}_ref"
        )

    return backward


def fp32_precision() -> str:
    """Triton's `input_precision` for fp32 operands, following torch's own matmul setting.

    "highest" (torch's default) gives IEEE fp32 products, as cuBLAS does then; "high" and "medium"
    give TF32. ROCm always gets IEEE fp32, which its matrix cores compute natively.
    """
    exact = torch.version.hip or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


@triton.jit
def offsets(row, stride_row, col, stride_col):
    """row * stride_row + col * stride_col, int64 [rows, cols]: where the elements of a tile lie."""
    return row.to(tl.int64)[:, None] * stride_row + col.to(tl.int64)[None, :] * stride_col


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + a b in fp32. The interpreter multiplies bf16 bit patterns: give it fp32 operands."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def round_to(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """x fp32 rounded to the nearest value of dtype, ties to even.

    The interpreter truncates fp32 to bf16, so there the low half is rounded away beforehand.
    """
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


def philox(seed: int, counter: torch.Tensor) -> list[torch.Tensor]:
    """The four words of tl.randint4x(seed, counter), as int64 in [0, 2**32): Philox4x32-10.

    counter int64, any shape. Source: Salmon et al. 2011, Parallel random numbers.
    """
    low_half, low_word = 0xFFFF, 0xFFFFFFFF

    def multiply(constant, word):
        """High and low word of a product of two words, whose 64 bits overflow an int64."""
        low = (constant & low_half) * word
        high = (constant >> 16) * word + (low >> 16)
        return high >> 16, (high & low_half) << 16 | low & low_half

    c0, c1 = counter & low_word, counter >> 32 & low_word
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & low_word, seed >> 32 & low_word
    for _ in range(10):
        (high_0, low_0), (high_2, low_2) = multiply(0xD2511F53, c0), multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = k0 + 0x9E3779B9 & low_word, k1 + 0xBB67AE85 & low_word
    return [c0, c1, c2, c3]


def philox_uniform(words: torch.Tensor) -> torch.Tensor:
    """tl.uint_to_uniform_float: words of `philox` -> fp32 in [0, 1), the same bits."""
    signed = words.to(torch.int32)
    return torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10
