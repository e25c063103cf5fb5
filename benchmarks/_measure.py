"""Checks the contenders of one case, then times them side by side: the core of every bench."""

import functools

import torch
from _harness import interleaved, peak_bytes
from _suite import Case, Contender, Work

BROKEN_DOWN = ("train_step", "decoder_layer")  # levels whose rows say what their time goes to


def relative_errors(got, truth) -> list[float]:
    """Per result the relative error in the Frobenius norm; integers must be equal."""
    errors = []
    for one, true in zip(got, truth, strict=True):
        if not true.is_floating_point():
            errors.append(0.0 if torch.equal(one, true) else float("inf"))
            continue
        norm = true.double().norm().item()
        errors.append((one.double() - true.double()).norm().item() / (norm or 1.0))
    return errors


def _twin(name: str) -> str:
    """The name of a contender behind torch.compile."""
    return "compiled" if name == "masked" else f"{name}, compiled"


def contenders_of(work: Work, compiled: bool) -> dict[str, Contender]:
    """The contenders, and those of work.compiles behind torch.compile."""
    contenders = dict(work.contenders)
    for name in work.compiles if compiled else ():
        if name in contenders:
            plain = contenders[name]
            forward = torch.compile(plain.forward)
            contenders[_twin(name)] = Contender(forward, plain.inputs, plain.after)
    return contenders


def _upstream(contender: Contender) -> tuple[torch.Tensor, ...]:
    """Random gradients of a contender's differentiable outputs."""
    return tuple(torch.randn_like(y) for y in contender.step() if y.requires_grad)


def prepare(work: Work, dtype: torch.dtype, compiled: bool):
    """({name: timed step}, {name: worst error}); SystemExit if a contender's result is wrong.

    Bound: 3 times the error of the eager masked contender in the same dtype, result by result, and
    an eps of the dtype. compiled: adds torch.compile of the contenders in work.compiles.
    """
    contenders = contenders_of(work, compiled)
    differ = {*work.differ, *(_twin(name) for name in work.differ)}
    upstream = _upstream(contenders["masked"])
    wide = work.truth.step()
    kinds = [y.dtype for y in wide if y.requires_grad]
    truth = work.truth.step(tuple(g.to(kind) for g, kind in zip(upstream, kinds, strict=True)))
    allowed = relative_errors(contenders["masked"].step(upstream), truth)
    steps, errors = {}, {}
    for name, contender in contenders.items():
        own = upstream
        if name in differ:
            own = _upstream(contender)
        steps[name] = lambda contender=contender, own=own: contender.run(own)
        if name in differ:
            continue
        found = relative_errors(contender.step(own), truth)
        errors[name] = max(found)
        for index, (error, masked_error) in enumerate(zip(found, allowed, strict=True)):
            if not error <= 3 * masked_error + torch.finfo(dtype).eps:
                raise SystemExit(
                    f"{name}: result {index} is wrong by {error:.2e} (masked: {masked_error:.2e}): "
                    "not timed"
                )
    return steps, errors


def run_level(
    name: str,
    module,
    case: Case,
    rates: dict,
    seconds: float,
    *,
    compiled: bool = False,
    memory: bool = True,
) -> list[dict]:
    """measure of a level: one with a check_case is checked on that, and timed on `case`."""
    errors = None
    if hasattr(module, "check_case"):
        small = module.check_case(case)
        work = module.work(small)
        _drop_unavailable(work, case)
        errors = prepare(work, case.dtype, compiled=False)[1]
    work = module.work(case)
    settings = {"compiled": compiled, "memory": memory, "checked": errors}
    return measure("level", name, case, work, rates, seconds, **settings)


def _drop_unavailable(work: Work, case: Case) -> None:
    if case.device.startswith("cuda"):
        return
    for contender in work.needs_gpu:
        if work.contenders.pop(contender, None) is not None:
            work.skipped.setdefault(contender, "needs a GPU")


def measure(
    kind: str,
    name: str,
    case: Case,
    work: Work,
    rates: dict,
    seconds: float,
    *,
    compiled: bool = False,
    memory: bool = False,
    checked: dict | None = None,
) -> list[dict]:
    """One row per contender, checked first; skipped ones get a row that says why.

    kind: "op" or "level", the key that holds `name`. memory: the peak of one step, too. checked:
    the errors that a smaller case found, where this one is too large for its truth.
    """
    _drop_unavailable(work, case)
    if checked is None:
        steps, errors = prepare(work, case.dtype, compiled)
    else:
        errors = checked
        contenders = contenders_of(work, compiled)
        steps = {n: functools.partial(c.run, _upstream(c)) for n, c in contenders.items()}
    times = interleaved(
        steps, seconds, case.device, graphs=steps if work.graphs is None else work.graphs
    )
    least_ms = max(work.flops / rates["flops"], work.bytes / rates["bytes"]) * 1e3
    setting = {
        "bench": kind,
        kind: name,
        "model": case.model,
        "tokens": case.tokens,
        "batch": case.batch,
        "lora": case.lora,
        "open": case.kept,
        "dtype": str(case.dtype).removeprefix("torch."),
    }
    rows = [
        {
            **setting,
            "contender": contender,
            **{k: round(v, 5) if isinstance(v, float) else v for k, v in value.items()},
            "peak_bytes": peak_bytes(steps[contender], case.device) if memory else None,
            "flops": work.flops,
            "bytes": work.bytes,
            "roofline": round(least_ms / value["ms"], 4),
            "error": errors.get(contender),
        }
        for contender, value in times.items()
    ]
    skipped = [{**setting, "contender": n, "skipped": why} for n, why in work.skipped.items()]
    if name in BROKEN_DOWN:
        for row in rows:
            row["breakdown"] = breakdown(steps[row["contender"]], case.device)
    return [*rows, *skipped]


# What a step's time goes to: the first pattern that is in a kernel's or an op's name decides.
_KINDS = (
    ("packing", ("fold_pack", "index_select")),
    ("attention", ("attention", "flash")),
    ("matmul", ("mm", "matmul", "linear", "_glu_", "gated_outer", "cutlass")),
    ("SwiGLU, gates", ("silu", "swiglu", "sigmoid", "tanh", "column_", "_gate")),
    ("norms, products, sums", ("mul", "add", "sum", "mean", "pow", "rsqrt", "norm", "elementwise")),
    ("loss", ("softmax", "nll", "cross_entropy")),
    ("optimizer", ("adam", "_foreach", "addcmul", "addcdiv")),
)  # fmt: skip


def breakdown(step, device: str) -> dict[str, float]:
    """{kind: ms} of one step, by torch's profiler: own time of each op, of each kernel on a GPU."""
    on_gpu = device.startswith("cuda")
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA] if on_gpu else [activity.CPU]
    step()
    with torch.profiler.profile(activities=activities) as profile:
        step()
    found: dict[str, float] = {}
    for event in profile.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        name = event.key.lower()
        kind = next((k for k, names in _KINDS if any(n in name for n in names)), "other")
        found[kind] = found.get(kind, 0.0) + spent / 1e3
    return {kind: round(ms, 4) for kind, ms in sorted(found.items(), key=lambda i: -i[1])}


def line(rows: list[dict]) -> str:
    """The rows of one case as a line of text."""
    first = rows[0]
    name = first[first["bench"]]
    setting = f"{name:16}{first['model']:13}{first['batch']:>3} x{first['tokens']:6}"
    timed = {row["contender"]: row for row in rows if "ms" in row}
    cells = "".join(
        f"  {name} {row['ms']:.3f}{' (graph)' if row['graph'] else ''}"
        for name, row in timed.items()
    )
    best = timed.get("ours", next(iter(timed.values())))
    lora = f" r={first['lora']}" if first["lora"] else ""
    skipped = "".join(f"  {r['contender']}: {r['skipped']}" for r in rows if "skipped" in r)
    return (
        f"{setting}{lora} {first['open']:5.0%}{cells}  roofline {best['roofline']:.0%}"
        f"{'  skipped:' if skipped else ''}{skipped}"
    )
