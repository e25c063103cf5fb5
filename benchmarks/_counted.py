"""The CPU ops of gatepack._C that compare.py counts the instructions of, under valgrind.

One thread, small shapes, nothing loaded but torch and the extension. Prints "ready" once all ops
have run, waits for a line on stdin (whoever started it switches callgrind on meanwhile), runs each
op once more between two of torch's switches, and prints the names in the order of callgrind's
dumps; "NAME: why" for what this tree does not have.
"""

import select
import sys
from collections.abc import Callable

import torch


def calls() -> dict[str, Callable[[], object]]:
    """{name: call} of the ops, for matrices of 768 x 288 and passes of 32 tokens."""
    ops = torch.ops.gatepack
    torch.manual_seed(0)
    n, k, tokens = 768, 288, 32
    w, z, rows = torch.randn(n, k), torch.rand(n // 2), torch.arange(0, n, 2)
    wide, packed = torch.randn(k, n), torch.randn(n // 2, k)
    a, u, dh = (torch.randn(tokens, n) for _ in range(3))
    gates, heads = torch.rand(n), torch.rand(n // 64)
    x = torch.randn(4, k)
    one = ([w], [rows], [None], [z], [None], [None], [None], [1.0], [64], [64], [0], None)
    return {
        "fold_pack rows": lambda: ops.fold_pack(w, rows, None, None, None, None),
        "fold_pack rows, gates": lambda: ops.fold_pack(w, rows, None, z, None, None),
        "fold_pack columns": lambda: ops.fold_pack(wide, None, rows, None, None, None),
        "fold_pack columns, gates": lambda: ops.fold_pack(wide, None, rows, None, z, None),
        "fold_pack to bf16": lambda: ops.fold_pack(w, rows, None, None, None, torch.bfloat16),
        "fold_pack_adjoint": lambda: ops.fold_pack_adjoint(packed, rows, None, z, None, n, k, None),
        "pack_tensors": lambda: ops.pack_tensors(*one),
        "open_sets": lambda: ops.open_sets([gates > 0.4]),
        "open_linear": lambda: ops.open_linear(x, w, None, rows, None, None, None, 1, 1),
        "open_linear_backward": lambda: ops.open_linear_backward(
            x, None, None, wide, None, rows, None, None, 1, 1
        ),
        "swiglu": lambda: ops.swiglu(a, u),
        "swiglu_backward": lambda: ops.swiglu_backward(dh, a, u),
        "swiglu, gates": lambda: ops.swiglu(a, u, gates),
        "swiglu_backward, gates": lambda: ops.swiglu_backward(dh, a, u, gates),
        "gate_lanes": lambda: ops.gate_lanes(a, heads, 64),
        "gate_lanes_backward": lambda: ops.gate_lanes_backward(dh, a, heads, 64),
        "column_products": lambda: ops.column_products(a, u),
    }


def main() -> None:
    if not torch._C._valgrind_supported_platform():
        sys.exit("this torch cannot switch callgrind")
    from gatepack import _ext

    if _ext.backend().name == "torch":
        sys.exit(_ext.backend().reason)
    torch.set_num_threads(1)
    found = {}
    for name, call in calls().items():
        try:
            call(), call()
            found[name] = call
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            print(f"{name}: {str(error).splitlines()[0]}")
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0.05)[0]:  # callgrind listens between the waits
        pass
    for name, call in found.items():
        torch._C._valgrind_toggle()
        call()
        torch._C._valgrind_toggle_and_dump_stats()
        print(name)


if __name__ == "__main__":
    main()
