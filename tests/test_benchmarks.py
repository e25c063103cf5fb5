"""The benchmarks' own parts, on the CPU: every op's contenders agree, and tuning searches."""

import dataclasses

import pytest
import torch
from _measure import prepare
from _suite import Case, Contender, modules
from tune import choices_of, neighbours, using

from gatepack.kernels import choose_config


@pytest.mark.parametrize("kept", [1.0, 0.6])
@pytest.mark.parametrize("op", modules())
def test_contenders_agree(op, kept):
    """`ours` runs in the interpreter here; prepare raises SystemExit if a result is wrong."""

    torch.manual_seed(0)
    work = modules([op])[op].work(Case("minilm-l6", 3, kept, torch.float32, "cpu"))
    work.contenders.pop("liger", None)
    steps, errors = prepare(work, torch.float32, compiled=False)
    assert {"ours", "masked"} <= set(errors) <= set(steps)
    assert work.flops >= 0 and work.bytes > 0


@pytest.mark.parametrize("kind", ["kernel_work", "model_work"])
def test_gates_are_drawn_as_models_draw_them(kind):
    """A CPU's work has no kernel: that is checked here, in the interpreter, all the same."""
    torch.manual_seed(0)
    module, case = (
        modules(["sample_gates"])["sample_gates"],
        Case("minilm-l6", 3, 0.6, torch.float32, "cpu"),
    )
    work = getattr(module, kind)(case)
    _, errors = prepare(work, torch.float32, compiled=False)
    assert {"ours", "masked"} <= set(errors)
    assert ("ours" in work.needs_gpu) == (kind == "kernel_work")
    closed = (work.contenders["ours"].step()[0] == 0).float().mean()
    assert 0.1 < closed < 0.6


def test_a_cpu_times_what_its_models_call_and_no_kernel():
    case = Case("minilm-l6", 3, 0.6, torch.float32, "cpu")
    timed = {op: "ours" not in module.work(case).needs_gpu for op, module in modules().items()
             if module.work(case) is not None}  # fmt: skip
    assert [op for op, ours in timed.items() if ours] == ["sample_gates"]


def test_a_wrong_contender_is_not_timed():

    work = modules(["gated_linear"])["gated_linear"].work(
        Case("minilm-l6", 3, 0.6, torch.float32, "cpu")
    )
    right = work.contenders["masked"]
    wrong = Contender(lambda *inputs: right.forward(*inputs) * 1.001, right.inputs)
    contenders = {"masked": right, "ours": wrong}
    with pytest.raises(SystemExit, match="ours: result 0 is wrong"):
        prepare(dataclasses.replace(work, contenders=contenders), torch.float32, compiled=False)


def test_unknown_op_is_refused():

    with pytest.raises(SystemExit, match="expected some of .*gated_linear.* got .*'nothing'"):
        modules(["nothing"])


def test_neighbours_differ_in_one_valid_field():

    config = choose_config("gated_linear", (8192, 4096, 4096), torch.bfloat16, "sm_90")
    found = list(neighbours(config))
    assert len(found) == len(set(found)) > 10
    for trial in found:
        (tile,) = (name for name in vars(config) if getattr(config, name) != getattr(trial, name))
        before, after = vars(getattr(config, tile)), vars(getattr(trial, tile))
        assert sum(before[name] != after[name] for name in before) == 1


def test_tuning_sees_and_replaces_the_choices_of_a_step():

    key = ("gated_linear", (4, 32, 32), torch.float32, "cpu")
    asked = choices_of(lambda: choose_config(*key))
    assert asked == {key: choose_config(*key)}
    trial = next(neighbours(asked[key]))
    with using({key: trial}):
        assert choose_config(*key) == trial
        assert choose_config("gated_linear", (8, 32, 32), *key[2:]) != trial
    assert choose_config(*key) == asked[key]
