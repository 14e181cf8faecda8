"""Deltas that pass through a ring: right in any order of calls and of streams."""

import pytest
import torch

import drift_merge
from drift_merge.training import placing
from drift_merge.training.deltas.held import Resident
from drift_merge.training.deltas.placement import Placement
from drift_merge.training.deltas.streamed import StreamedDeltas
from drift_merge.training.units import Origin, Region, Unit, blocks_of
from tests.training.deltas.simulated import MUTANTS, SCHEDULES, OnDevice, SimulatedQueues
from tests.training.toys import loss_of, read_region, selected

CPU = torch.device("cpu")
NUMEL = 12


class Counting(Resident):
    """Packed deltas that say what was read of them, and when."""

    def __init__(self, regions):
        self.read = []
        super().__init__(Resident.of_values({u: values_of(u) for u in regions})._held)

    def pack(self, unit, region, out, readers=None):
        self.read.append(unit.name)
        super().pack(unit, region, out, readers)


def values_of(unit):
    return torch.arange(float(NUMEL)) + 100 * int(unit.name)


def units(count):
    found = {}
    for number in range(count):
        parameter = torch.nn.Parameter(torch.empty(NUMEL))
        unit = Unit(str(number), "p", parameter, "mlp", 0, (NUMEL,), 0, Origin(0, 0, False))
        found[unit] = Region(flat=(0, NUMEL))
    return found


def order_of(kind, listed):
    """The units that are asked for in three steps."""
    if kind == "one by one":
        return [[u for u in listed for _ in range(2)]] * 3
    if kind == "all twice":  # sharded gradients are all measured before one is biased
        return [listed * 2] * 3
    if kind == "backward":
        return [listed[::-1]] * 3
    picked = (3, 1, 4, 1, 5, 9, 2, 6)
    return [[listed[(i + step) % len(listed)] for i in picked] for step in range(3)]


ORDERS = ("one by one", "all twice", "backward", "random")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_streamed_deltas_are_right_in_any_order(count, order):
    regions = units(count)
    streamed = StreamedDeltas(Counting(regions), regions, CPU)
    for step in order_of(order, list(regions)):
        for unit in step:
            assert torch.equal(read_region(streamed, unit, regions[unit]), values_of(unit))
        streamed.end_step()
    streamed.close()


@pytest.mark.parametrize("order", ["one by one", "all twice"])
def test_each_unit_is_read_once_a_pass_and_a_step_begins_with_a_full_ring(order):
    regions = units(5)
    source = Counting(regions)
    streamed = StreamedDeltas(source, regions, CPU)
    for step in order_of(order, list(regions)):
        for unit in step:
            read_region(streamed, unit, regions[unit])
        streamed.end_step()
    streamed.close()
    passes = 1 if order == "one by one" else 2
    assert source.read == list("01234") * 3 * passes + list("012")


def run(queues, order, count=5):
    """What is read of all units in three steps, and whether memory was left alone after close."""
    regions = units(count)
    streamed = StreamedDeltas(Counting(regions), regions, CPU, queues)
    found = []
    with OnDevice(queues):
        for step in order_of(order, list(regions)):
            for unit in step:
                out = torch.empty(NUMEL)
                begin = 0
                for block in blocks_of(unit, regions[unit], 5):
                    streamed.chunk(unit, begin, block, out[begin : begin + block.numel])
                    begin += block.numel
                found.append((unit, out))
            streamed.end_step()
    streamed.close()
    for buffer in queues.buffers:  # the allocator gives them to others
        queues.queue(lambda buffer=buffer: buffer.fill_(7))
    queues.finish()
    is_left = all(bool((buffer == 7).all()) for buffer in queues.buffers)
    return is_left and all(torch.equal(out, values_of(unit)) for unit, out in found)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_whatever_the_streams_do_first_the_values_are_right(schedule, order):
    assert all(run(SimulatedQueues(schedule, seed), order) for seed in range(6))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_simulation_notices_each_order_that_is_not_kept(mutant):
    wrong = [
        not run(mutant(schedule, seed), order)
        for schedule in SCHEDULES
        for order in ORDERS[:2]
        for seed in range(3)
    ]
    assert any(wrong)


def test_a_file_that_cannot_be_read_is_an_error_of_the_step():
    class Broken(Counting):
        def pack(self, unit, region, out, readers=None):
            raise OSError("gone")

    regions = units(3)
    streamed = StreamedDeltas(Broken(regions), regions, CPU)
    unit = next(iter(regions))
    with pytest.raises(OSError, match="gone"):
        read_region(streamed, unit, regions[unit])
    streamed.close()


def test_a_handle_sends_each_delta_once_a_step_and_ends_in_remove(toy, monkeypatch):
    sent = []

    class Watched(StreamedDeltas):
        def _carry(self, unit, slot):
            sent.append(unit.name)
            super()._carry(unit, slot)

    def place(source, regions, device, **_):
        from drift_merge.training.deltas.packed import PackedFiles

        return Placement(Watched(PackedFiles(source), regions, device), "streamed", 0, "streamed")

    monkeypatch.setattr(placing, "place", place)
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)
    for step in range(2):
        model.zero_grad()
        loss_of(model, step).backward()
        handle.apply()
        handle.report()  # from the files: not one more is sent
    placed = handle._bias._placing.found.source
    handle.remove()
    assert len(sent) == 2 * len(selected(model)) + 3
    assert not placed._slots
