"""Samples that are kept between forwards, and what makes them anew."""

import pytest
import torch

import gatepack as gp
from gatepack.gates import GateSet, GateSpec


def make_gates():
    config = gp.GateConfig(noise=0.2, target=0.5, width_multiple=1)
    return GateSet(config, {"a:heads": GateSpec("heads", 6, 4, 100)})


class TestWritesThatVersionsDoNotCount:
    """Noiseless values are kept between forwards, by the version of the logits."""

    @staticmethod
    def evaluated():
        gates = make_gates().eval()
        with torch.no_grad():
            assert bool((gates.draw().flat > 0).all())
        return gates

    @torch.no_grad()
    @pytest.mark.parametrize("refresh", ["eval", "train", "sync_from_buffers"])
    def test_are_seen_after_a_refresh(self, refresh):
        gates = self.evaluated()
        gates.logits.data[2] = -9.0
        getattr(gates, refresh)()
        assert gates.eval().draw().flat[2] == 0 and gates["a:heads"].values()[2] == 0

    @torch.no_grad()
    def test_values_that_stand_in_for_the_logits(self):
        gates = self.evaluated()
        others = {"logits": torch.full_like(gates.logits, -9.0)}
        assert others["logits"]._version == gates.logits._version

        class Reader(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.gates = gates

            def forward(self):
                return self.gates.draw().flat

        read = Reader().eval()
        named = {f"gates.{name}": tensor for name, tensor in others.items()}
        assert not torch.func.functional_call(read, named, ()).any()
        assert bool((read() > 0).all())

    def test_switching_modes_keeps_the_noise_of_a_forward(self):
        gates = make_gates().train()
        with torch.no_grad():
            flat = gates.draw().flat
            gates.train()
            assert gates.sample().flat is flat
