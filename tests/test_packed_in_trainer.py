"""A Trainer whose model has been packed still evaluates it, and says what is kept."""

import pytest
from trainers import METHODS, trainer

import gatepack as gp


@pytest.mark.parametrize("name", METHODS)
def test_a_packed_model_is_evaluated_and_logged(name, tmp_path):
    run = trainer(name, tmp_path)
    run.train()
    before = run.evaluate()["eval_loss"]
    report = gp.pack(run.model)
    assert run.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-5)
    assert abs(report.kept_fraction - METHODS[name][1]) <= 0.005
    logged = run.state.log_history[-1]["gates/kept_fraction"]
    assert logged == pytest.approx(report.kept_fraction, abs=1e-4)
