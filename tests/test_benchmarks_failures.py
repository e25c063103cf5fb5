"""A benchmark that fails costs no other one, nor what has been found before."""

import sys
from unittest import mock

import _harness
import pytest
import run
import torch
import tune
from _suite import Case

FIRST = {"model": "minilm-l6", "tokens": 3, "kept": 0.6}
SECOND = {"model": "minilm-l6", "tokens": 4, "kept": 0.6}


@pytest.fixture
def script(tmp_path, monkeypatch):
    """script(*options) runs run.py, on two cases of which the first fails; returns its status and
    the tokens of the cases that were begun."""
    begun = []

    def measured(name, module, case: Case, *_, **__):
        begun.append(case.tokens)
        if case.tokens == 3:
            raise AttributeError("of one case alone")
        return [{"bench": "level", "level": name, **SECOND, "contender": "ours", "ms": 1.0}]

    monkeypatch.setattr(run, "run_level", measured)
    monkeypatch.setattr(run, "line", lambda rows: "")
    monkeypatch.setattr(run, "table", lambda *_: "")
    rates = {"flops": 1.0, "copy": 1.0, "read": 1.0, "bytes": 1.0}
    monkeypatch.setattr(run, "ceilings", lambda *_: rates)
    cases = [("level", "mlp", fields) for fields in (FIRST, SECOND)]
    monkeypatch.setattr(run, "cases_of", lambda *_: cases)

    def script(*options):
        begun.clear()
        command = ["run.py", "--device", "cpu", "--out", str(tmp_path), "--parts", "levels"]
        monkeypatch.setattr(sys, "argv", [*command, *options])
        with pytest.raises(SystemExit) as end:
            run.main()
        return end.value.code, list(begun)

    return script


def test_an_error_of_any_kind_ends_one_case_only(script, tmp_path, capsys):
    assert script() == (1, [3, 4])
    captured = capsys.readouterr()
    assert "FAILED mlp" in captured.out and "of one case alone" in captured.out
    assert "Traceback" in captured.err
    assert [row["tokens"] for row in run.read_results(tmp_path) if "ms" in row] == [4]


def test_a_lost_gpu_is_left_to_a_new_process(script, monkeypatch):
    def lost(self):
        if self.failed:
            raise run.DeviceLost

    monkeypatch.setattr(run.Bench, "_free", lost)
    with mock.patch.object(run.os, "execv", side_effect=SystemExit(0)) as execv:
        script()
    executable, (_, *command) = execv.call_args.args
    assert executable == sys.executable and command[0] == "run.py"
    options = command[command.index("--tried") :]
    assert options == ["--tried", 'mlp {"model": "minilm-l6", "tokens": 3, "kept": 0.6}']


def test_a_new_process_leaves_out_what_was_tried(script):
    status, begun = script("--tried", 'mlp {"model": "minilm-l6", "tokens": 3, "kept": 0.6}')
    assert begun == [4] and status == 1  # of the earlier process


def test_an_error_of_the_gpu_is_noticed(monkeypatch):
    bench = mock.Mock(on_gpu=True)
    monkeypatch.setattr(torch.cuda, "synchronize", mock.Mock(side_effect=RuntimeError("illegal")))
    with pytest.raises(run.DeviceLost):
        run.Bench._free(bench)
    run.Bench._free(mock.Mock(on_gpu=False))


def test_a_function_that_waits_is_found_before_its_capture(monkeypatch):
    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits():
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    assert _harness.makes_the_host_wait(waits) and modes == [0, "error", 0]
    assert not _harness.makes_the_host_wait(lambda: None)


def test_results_name_their_commit_without_git(monkeypatch):
    monkeypatch.setattr(_harness.subprocess, "run", mock.Mock(side_effect=FileNotFoundError("git")))
    monkeypatch.setenv("GATEPACK_COMMIT", "abc1234")
    assert _harness.environment()["commit"] == "abc1234"
    monkeypatch.delenv("GATEPACK_COMMIT")
    assert _harness.environment()["commit"] == ""


def test_a_climb_tells_each_step_as_it_is_found(monkeypatch):
    key = ("gated_linear", (4, 32, 32), torch.float32, "cpu")
    ratios = iter([0.5, 0.9])
    monkeypatch.setattr(tune, "faster", lambda *_: next(ratios, None))
    found = tune.climb(lambda: tune._configs.choose_config(*key), 0.0, "cpu")
    first = next(found)
    assert first[0] == key and first[2] == 0.5
    later = list(found)
    assert [gain for *_, gain in later] == [0.45, 0.45] and later[0][1] == later[1][1] != first[1]
