"""Open sets of a sample, and samples that are kept between forwards."""

import pytest
import torch
from tiny import make_gates

from gatepack.samples import lane_indices


class TestOpen:
    def open_of(self, name, mask):
        gates = make_gates(noise=0.0)
        gates.set_open({name: torch.tensor(mask, dtype=torch.bool)})
        return gates, gates[name].open()

    def test_all_open(self):
        gates = make_gates(noise=0.0)
        for name in gates:
            current = gates[name].open()
            assert current.units is None and current.lanes is None and current.shared is None
            assert current.shared_lanes is None and current.shared_of_unit is None
            assert current.count == gates[name].size and current.ones
        assert gates["a:heads"].open().shared_count == 2
        assert torch.equal(gates["a:heads"].open().values, torch.ones(6))

    def test_all_closed_heads_keep_one_unit_of_value_zero(self):
        _, current = self.open_of("a:heads", [0] * 6)
        assert current.units.tolist() == [0] and current.values.tolist() == [0.0]
        assert current.count == 1 and current.lanes.tolist() == [0, 1, 2, 3] and not current.ones
        assert current.shared.tolist() == [0] and current.shared_lanes.tolist() == [0, 1, 2, 3]

    def test_all_closed_channels_keep_nothing(self):
        _, current = self.open_of("b:channels", [0] * 16)
        assert current.units.tolist() == [] and current.values.shape == (0,)
        assert current.count == 0 and current.lanes.tolist() == []

    def test_even_heads(self):
        _, current = self.open_of("a:heads", [1, 0, 1, 0, 1, 1])
        assert current.units.tolist() == [0, 2, 4, 5]
        assert current.lanes.tolist() == [0, 1, 2, 3, *range(8, 12), *range(16, 24)]
        assert (
            current.shared is None and current.shared_count == 2 and current.shared_of_unit is None
        )

    def test_ragged_heads(self):
        _, current = self.open_of("a:heads", [1, 0, 1, 0, 1, 0])
        assert current.units.tolist() == [0, 2, 4]
        assert current.shared is None and current.shared_of_unit.tolist() == [0, 0, 1]

    def test_one_block(self):
        _, current = self.open_of("a:heads", [0, 0, 0, 1, 1, 0])
        assert current.shared.tolist() == [1] and current.shared_count == 1
        assert current.shared_lanes.tolist() == [4, 5, 6, 7] and current.shared_of_unit is None

    def test_fractional_values_are_not_ones(self):
        gates = make_gates(noise=0.0)
        with torch.no_grad():
            gates.logits[7] = 0.2
        current = gates["b:channels"].open()
        assert not current.ones and current.units is None
        assert torch.equal(current.values, gates.deterministic_values()[6:])
        assert gates["a:heads"].open().ones

    def test_values_of_all_gates_are_one_step_of_autograd(self):
        gates = make_gates(noise=0.0)
        gates.set_open({"a:heads": torch.arange(6) < 2, "b:channels": torch.arange(16) != 3})
        heads, channels = (gates[name].open() for name in ("a:heads", "b:channels"))
        assert heads.values.grad_fn is not None
        nodes = [current.values.grad_fn.next_functions for current in (heads, channels)]
        assert nodes[0] == nodes[1]
        upstream = torch.randn(15)
        (heads.values.sum() + (channels.values * upstream).sum()).backward()
        grads = gates.split(gates.value_grads())
        assert grads["a:heads"].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
        assert torch.equal(grads["b:channels"][channels.units], upstream)
        assert grads["b:channels"][3] == 0

    def test_lane_indices(self):
        units = torch.tensor([1, 4])
        assert lane_indices(units, 1) is units
        assert lane_indices(units, 3).tolist() == [3, 4, 5, 12, 13, 14]


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
