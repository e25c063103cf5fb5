"""fold_pack and its adjoint: bytes against plain torch, adjointness, refusals, registrations."""

import contextlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import DTYPES, LEVELS, assert_same_bytes, gate, instruction_set, matrix
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gatepack._ext import fold_pack, fold_pack_adjoint, fold_pack_adjoint_ref, fold_pack_ref

# Below, at and above one vector of every instruction set, a tail of one, and a model's own width.
SHAPES = ((1, 1), (3, 17), (40, 33), (65, 100), (9, 576))
SUBSETS = ("all", "empty", "single", "mixed", "full", "runs")


def subset(kind, size, seed, dtype=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    if kind == "all":
        return None
    if kind == "mixed":
        open_ = torch.rand(size, generator=generator) < 0.6
    elif kind == "runs":
        open_ = (torch.arange(size) // 8 % 3) != 1
    elif kind == "single":
        open_ = torch.arange(size) == size // 2
    else:
        open_ = torch.full((size,), kind == "full")
    return open_.nonzero()[:, 0].to(dtype)


def naive(w, rows, cols, z_out, z_in, dtype):
    """The formula as one would type it, with nothing shared with the package."""
    kept = w if rows is None else w.index_select(0, rows)
    kept = kept if cols is None else kept.index_select(1, cols)
    kept = kept.to(torch.float64 if w.dtype == torch.float64 else torch.float32)
    kept = kept if z_out is None else kept * z_out[:, None]
    kept = kept if z_in is None else kept * z_in[None]
    return kept.to(dtype or w.dtype)


@pytest.fixture(params=("reference", *LEVELS))
def implementation(request):
    """(fold_pack, adjoint) of plain torch and of each instruction set that this machine has."""
    if request.param == "reference":
        yield fold_pack_ref, fold_pack_adjoint_ref
        return
    with instruction_set(request.param):
        yield fold_pack, fold_pack_adjoint


@pytest.mark.parametrize("column_major", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_equal_plain_torch(implementation, shape, dtype, column_major):
    pack, adjoint = implementation
    m, n = shape
    w = matrix(m, n, dtype, column_major)
    for k, kind in enumerate(SUBSETS):
        rows = subset(kind, m, k)
        cols = subset(SUBSETS[-1 - k], n, k + 1, torch.int32)
        # One side alone takes other branches, whatever the subset; two kinds of it are enough.
        one_side = ((rows, None), (None, cols)) if kind in ("mixed", "runs") else ()
        for r, c in ((rows, cols), *one_side):
            kept = (m if r is None else len(r), n if c is None else len(c))
            for gates in range(4):
                z_out = gate(kept[0], 1) if gates & 1 else None
                z_in = gate(kept[1], 2) if gates & 2 else None
                # A cast does not depend on which gates are present.
                for out in (None, *DTYPES) if gates in (0, 3) else (None,):
                    packed = pack(w, r, c, z_out, z_in, out)
                    assert_same_bytes(packed, naive(w, r, c, z_out, z_in, out))
                    assert packed.is_contiguous() or column_major
                    full = adjoint(packed, r, c, z_out, z_in, m, n, out)
                    expected = torch.zeros(m, n, dtype=out or packed.dtype)
                    at_rows = torch.arange(m) if r is None else r
                    at_cols = torch.arange(n) if c is None else c.long()
                    values = naive(packed, None, None, z_out, z_in, out)
                    expected[at_rows[:, None], at_cols[None]] = values
                    assert_same_bytes(full, expected)


@pytest.mark.parametrize("column_major", (False, True))
def test_result_keeps_majorness(implementation, column_major):
    pack, adjoint = implementation
    packed = pack(matrix(12, 20, torch.float32, column_major), subset("mixed", 12, 0))
    assert packed.t().is_contiguous() == column_major
    full = adjoint(packed, subset("mixed", 12, 0), None, None, None, 12, 20)
    assert full.t().is_contiguous() == column_major


def test_view_with_gaps_between_lines(implementation):
    pack, _ = implementation
    wide = matrix(20, 200, torch.bfloat16)
    w = wide[3:17, 11:140]
    rows, cols = subset("mixed", 14, 0), subset("mixed", 129, 1)
    expected = naive(w, rows, cols, None, gate(len(cols), 2), None)
    assert_same_bytes(pack(w, rows, cols, None, gate(len(cols), 2)), expected)


def test_threads_do_not_overwrite_each_other(implementation):
    """Whole-vector stores may not leave their line, which ends beside another thread's first."""
    pack, _ = implementation
    w = matrix(50, 4097, torch.bfloat16)
    cols = subset("mixed", 4097, 3)
    for _ in range(5):
        assert_same_bytes(pack(w, None, cols), naive(w, None, cols, None, None, None))


def test_fp64_gates_with_an_fp64_matrix(implementation):
    pack, _ = implementation
    w, z = matrix(8, 30, torch.float64), gate(30, 0, torch.float64)
    assert_same_bytes(pack(w, None, None, None, z), naive(w, None, None, None, z, None))


@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_past_the_caches_the_bytes_are_the_same(dtype, column_major):
    """From 256 KiB on, on several threads; lines that end inside a cache line."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        w = matrix(700, 501, dtype, column_major)
        rows, cols = subset("mixed", 700, 0), subset("mixed", 501, 1)
        some = (rows, None), (None, cols, None, gate(len(cols), 1)), (rows, cols), (None, None)
        for chosen in some:
            for out in (None, torch.float64):
                expected = fold_pack(w, *chosen, dtype=out)
                assert_same_bytes(fold_pack(w, *chosen, dtype=out, stream=True), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_exact(dtype):
    w = matrix(30, 70, dtype)
    rows, cols = subset("mixed", 30, 0), subset("mixed", 70, 1)
    back = fold_pack_adjoint(fold_pack(w, rows, cols), rows, cols, None, None, 30, 70)
    assert_same_bytes(back[rows][:, cols], w[rows][:, cols])
    back[rows[:, None], cols[None]] = 0
    assert not back.any()


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 40), st.integers(1, 90), st.booleans())
def test_adjoint_identity(data, m, n, column_major):
    def indices(size):
        return torch.tensor(sorted(data.draw(st.sets(st.integers(0, size - 1)))), dtype=torch.int64)

    w = matrix(m, n, torch.float64, column_major)
    rows, cols = indices(m), indices(n)
    z_out, z_in = gate(len(rows), 1, torch.float64), gate(len(cols), 2, torch.float64)
    packed = fold_pack(w, rows, cols, z_out, z_in)
    g = matrix(len(rows), len(cols), torch.float64, seed=4)
    full = fold_pack_adjoint(g, rows, cols, z_out, z_in, m, n)
    left, right = (packed * g).sum(), (w * full).sum()
    bound = 1e-12 * (packed * g).abs().sum()  # rounding of the two sums
    assert (left - right).abs() <= bound


@pytest.mark.parametrize(
    "change, message",
    (
        ({"rows": torch.tensor([1, 1])}, "rows must be strictly increasing"),
        ({"rows": torch.tensor([2, 1])}, "rows must be strictly increasing"),
        ({"rows": torch.tensor([0, 4])}, r"rows must be in \[0, 4\), got 4"),
        ({"rows": torch.tensor([-1, 2])}, r"rows must be in \[0, 4\), got -1"),
        ({"cols": torch.tensor([-1, 2])}, r"cols must be in \[0, 6\), got -1"),
        ({"cols": torch.tensor([0.0])}, "cols must be int64 or int32"),
        ({"cols": torch.tensor([[0]])}, "cols must have 1 dimension, got 2"),
        ({"z_out": torch.ones(3)}, r"z_out must have one value per kept unit \(4\), got 3"),
        ({"z_in": torch.ones(6, dtype=torch.bfloat16)}, "z_in must be float32"),
        ({"z_in": torch.ones(6, dtype=torch.float64)}, "z_in must be float32"),
        ({"w": torch.ones(4)}, "w must have 2 dimensions, got 1"),
        ({"w": torch.ones(4, 6, dtype=torch.int32)}, "w must be float32"),
        ({"w": torch.ones(8, 12)[::2, ::2]}, "w must have stride 1 in one dimension"),
        ({"dtype": torch.int8}, "dtype must be float32"),
    ),
)
def test_refusals_name_the_argument(implementation, change, message):
    pack, _ = implementation
    arguments = {"w": torch.ones(4, 6), **change}
    with pytest.raises(ValueError, match=message):
        pack(**arguments)


def test_adjoint_refuses_a_gradient_of_another_shape(implementation):
    _, adjoint = implementation
    with pytest.raises(ValueError, match="g must be 2 x 6, got 3 x 6"):
        adjoint(torch.ones(3, 6), torch.tensor([0, 1]), None, None, None, 4, 6)


def test_gates_that_require_grad_are_refused():
    z = torch.ones(6, requires_grad=True)
    with pytest.raises(ValueError, match="z_in must not require grad"):
        fold_pack(torch.ones(4, 6), None, None, None, z)
    with torch.no_grad():
        fold_pack(torch.ones(4, 6), None, None, None, z)


@pytest.mark.parametrize("column_major", (False, True))
def test_gradients_in_fp64(column_major):
    w = matrix(5, 9, torch.float64, column_major).requires_grad_()
    rows, cols = subset("mixed", 5, 1), subset("mixed", 9, 1)
    z_out, z_in = gate(len(rows), 1), gate(len(cols), 2, torch.float64)

    def run(w):
        return fold_pack(w, rows, cols, z_out, z_in)

    torch.autograd.gradcheck(run, (w,))
    torch.autograd.gradgradcheck(run, (w,))


def test_gradient_reaches_the_dtype_of_w():
    w = matrix(8, 20, torch.float32).requires_grad_()
    cols = subset("mixed", 20, 0)
    out = fold_pack(w, None, cols, None, gate(len(cols), 1), torch.bfloat16)
    g = matrix(8, len(cols), torch.bfloat16, seed=3)
    out.backward(g)
    expected = fold_pack_adjoint_ref(g, None, cols, None, gate(len(cols), 1), 8, 20, torch.float32)
    assert_same_bytes(w.grad, expected)


def test_gradient_of_an_expanded_upstream():
    w = matrix(8, 20, torch.float32).requires_grad_()
    fold_pack(w, subset("single", 8, 0)).sum().backward()
    assert w.grad.sum() == 20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((7, 3), (40, 130), (300, 700), (9, 20011)))
def test_rows_alone(shape, dtype):
    """Runs of rows are copied as one, in pieces, by an op of their own."""
    m, n = shape
    w, gaps = matrix(m, n, dtype), matrix(m, n + 5, dtype)[:, 2 : n + 2]
    threads = torch.get_num_threads()
    try:
        for kind, some in itertools.product(SUBSETS[1:], (1, 2)):
            torch.set_num_threads(some)
            rows = subset(kind, m, 0)
            expected = w.index_select(0, rows)
            assert_same_bytes(fold_pack(w, rows), expected)
            assert_same_bytes(torch.ops.gatepack.pack_rows(w, rows), expected)
            assert_same_bytes(fold_pack(w, rows.int()), expected)
            assert_same_bytes(fold_pack(w.t().contiguous().t(), rows), expected)
            assert_same_bytes(fold_pack(gaps, rows), gaps.index_select(0, rows))
    finally:
        torch.set_num_threads(threads)


def test_compiles_without_a_graph_break():
    w = matrix(16, 64, torch.float32).requires_grad_()
    cols, g = subset("mixed", 64, 0), None

    def run(w):
        return fold_pack(w, None, cols, None, gate_values) * 2

    gate_values = gate(len(cols), 1)
    eager = run(w)
    g = torch.randn_like(eager)
    (expected,) = torch.autograd.grad(eager, w, g)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(w)
    assert_same_bytes(compiled.detach(), eager.detach())
    (actual,) = torch.autograd.grad(compiled, w, g)
    assert_same_bytes(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("column_major", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((1, 1), (40, 33), (65, 104), (576, 1536)))
def test_cuda_writes_the_bytes_of_the_cpu(shape, dtype, column_major):
    m, n = shape
    w = matrix(m, n, dtype, column_major)
    for kind in SUBSETS:
        rows, cols = subset(kind, m, 0), subset(kind, n, 1)
        for r, c in ((rows, cols), (rows, None), (None, cols)):
            kept = (m if r is None else len(r), n if c is None else len(c))
            z_out, z_in = gate(kept[0], 1), gate(kept[1], 2)
            for out in (None, *DTYPES):
                expected = fold_pack(w, r, c, z_out, z_in, out)
                put = [None if t is None else t.cuda() for t in (r, c, z_out, z_in)]
                # .cuda() keeps the strides of a dense column-major matrix.
                actual = fold_pack(w.cuda(), *put, out)
                assert_same_bytes(actual.cpu(), expected)
                full = fold_pack_adjoint(actual, *put, m, n, w.dtype)
                back = fold_pack_adjoint(expected, r, c, z_out, z_in, m, n, w.dtype)
                if out != torch.float64 or dtype == torch.float64:
                    assert_same_bytes(full.cpu(), back)


class Seen(TorchDispatchMode):
    """The names of the ops that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))


class Tagged(torch.Tensor):
    """A subclass that overrides functions in the default way."""


class TestPlainCall:
    """What stands between Python and the dispatcher is left out for plain tensors only."""

    w, rows = torch.arange(24.0).view(4, 6), torch.tensor([0, 3])

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_dispatch_mode_sees_the_op(self, requires_grad):
        w = self.w.clone().requires_grad_(requires_grad)
        with Seen() as seen:
            packed = fold_pack(w, self.rows)
        assert seen.names == ["gatepack::fold_pack"]
        assert packed.requires_grad == requires_grad

    def test_function_mode_and_subclass(self):
        class Named(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                names.append(str(function))
                return function(*args, **(kwargs or {}))

        names = []
        with Named():
            fold_pack(self.w, self.rows)
        assert "gatepack.fold_pack.default" in names
        assert type(fold_pack(self.w.as_subclass(Tagged), self.rows)) is Tagged
        assert type(fold_pack(self.w, self.rows.as_subclass(Tagged))) is Tagged

    def test_fakes_and_functorch(self):
        with FakeTensorMode() as mode:
            fake = fold_pack(mode.from_tensor(self.w), mode.from_tensor(self.rows))
        assert type(fake) is FakeTensor and fake.shape == (2, 6)
        batch = torch.stack([self.w, -self.w])
        packed = torch.vmap(lambda w: fold_pack(w, self.rows))(batch)
        assert torch.equal(packed, batch[:, self.rows])

    def test_lazy_negation_is_resolved(self):
        negative = torch._neg_view(self.w)
        assert negative.is_neg()
        assert torch.equal(fold_pack(negative, self.rows), -self.w[self.rows])

    def test_profiler_names_the_op(self):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            fold_pack(self.w, self.rows)
            fold_pack(self.w, None, self.rows)
        names = {event.key for event in profile.key_averages()}
        assert {"gatepack::pack_rows", "gatepack::fold_pack"} <= names

    def test_the_state_of_autograd_is_put_back(self):
        key = torch._C.DispatchKey.AutogradFunctionality
        for index in ((self.rows,), (-self.rows,), (None, self.rows), (None, -self.rows)):
            with contextlib.suppress(ValueError):
                fold_pack(self.w, *index)
            assert not torch._C._dispatch_tls_is_dispatch_key_excluded(key)
        with torch._C._AutoDispatchBelowAutograd():
            fold_pack(self.w, self.rows)
            fold_pack(self.w, None, self.rows)
            assert torch._C._dispatch_tls_is_dispatch_key_excluded(key)
        for index in ((self.rows,), (None, self.rows)):
            with torch.inference_mode():
                assert fold_pack(self.w, *index).is_inference()
            with torch.no_grad():
                assert not fold_pack(self.w.clone().requires_grad_(), *index).requires_grad
