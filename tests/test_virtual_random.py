"""Random numbers of virtual GPUs, and their states: 16 bytes, as CUDA's are."""

from __future__ import annotations

import copy
import pickle
from random import Random

import pytest
import torch

import course_lib

Devices = list[torch.device]


@pytest.fixture
def vgpus() -> Devices:
    return course_lib.devices(2)


def draw(random: Random, device: torch.device, generator: torch.Generator | None = None) -> None:
    """Draw something of a random kind and size; few normal numbers are drawn in pairs."""
    numbers = torch.empty(random.choice([1, 3, 5, 17, 1000, 20_000]), device=device)
    kind = random.choice(["uniform", "normal", "few normal", "bernoulli", "double"])
    if kind == "uniform":
        numbers.uniform_(generator=generator)
    elif kind == "normal":
        numbers.normal_(generator=generator)
    elif kind == "few normal":
        numbers[:3].normal_(generator=generator)
    elif kind == "bernoulli":
        numbers.bernoulli_(0.3, generator=generator)
    else:
        numbers.double().normal_(generator=generator)


def next_numbers(device: torch.device, generator: torch.Generator | None = None) -> list[float]:
    normal = torch.randn(3, device=device, generator=generator)
    return [*normal.tolist(), *torch.rand(5, device=device, generator=generator).tolist()]


def test_a_state_is_a_seed_and_an_offset(vgpus: Devices):
    torch.manual_seed(7)
    state = torch.vgpu.get_rng_state(vgpus[0])
    assert (state.dtype, state.shape, state.device.type) == (torch.uint8, (16,), "cpu")
    assert state.view(torch.int64).tolist() == [7, 0]
    torch.rand(10, device=vgpus[0])
    assert torch.vgpu.get_rng_state(vgpus[0]).view(torch.int64).tolist() == [7, 5]
    assert torch.vgpu.get_rng_state(vgpus[1]).view(torch.int64).tolist() == [7, 0]


@pytest.mark.parametrize("seed", range(12))
def test_sixteen_bytes_say_all_that_comes_whoever_reads_them(vgpus: Devices, seed: int):
    random = Random(seed)
    torch.manual_seed(seed)
    for _ in range(random.randrange(8)):
        draw(random, vgpus[0])
    state = torch.vgpu.get_rng_state(vgpus[0])
    numbers = next_numbers(vgpus[0])
    torch.vgpu.set_rng_state(state, vgpus[0])
    assert next_numbers(vgpus[0]) == numbers
    another = torch.Generator(device=vgpus[1])  # knows nothing but the bytes
    another.set_state(state)
    assert next_numbers(vgpus[1], another) == numbers
    assert torch.equal(another.get_state(), torch.vgpu.get_rng_state(vgpus[0]))


def test_to_ask_for_the_state_changes_no_number(vgpus: Devices):
    def numbers(asks: bool) -> list[float]:
        torch.manual_seed(1)
        drawn = []
        for _ in range(3):
            drawn += next_numbers(vgpus[0]) + torch.randn(700, device=vgpus[0]).tolist()
            drawn += torch.randn(3, device=vgpus[0]).tolist()  # half of a pair is kept
            if asks:
                torch.vgpu.get_rng_state(vgpus[0])
        return drawn

    assert numbers(asks=True) == numbers(asks=False)


def test_the_numbers_are_those_of_the_cpu(vgpus: Devices):
    torch.manual_seed(3)
    here = [torch.randn(5, device=vgpus[0]).tolist() for _ in range(3)]
    assert here == [torch.randn(5).tolist() for _ in range(3)]


def test_who_adds_a_tensors_size_to_an_offset_repeats_no_number(vgpus: Devices):
    """As DTensor does between its random operators, and for each rank's shard."""
    generator = torch.Generator(device=vgpus[0]).manual_seed(5)
    shards = []
    for shard in range(4):
        state = torch.tensor([5, 1000 * shard]).view(torch.uint8)
        generator.set_state(state)
        shards.append(torch.rand(1000, device=vgpus[0], dtype=torch.double, generator=generator))
    assert torch.cat(shards).unique().numel() == 4000
    generator.set_state(torch.tensor([5, 1000]).view(torch.uint8))
    again = torch.rand(1000, device=vgpus[0], dtype=torch.double, generator=generator)
    assert torch.equal(again, shards[1])


def test_the_state_of_a_cpus_generator_is_refused(vgpus: Devices):
    with pytest.raises(RuntimeError, match="RNG state is wrong size: that of vgpu:0"):
        torch.vgpu.set_rng_state(torch.get_rng_state(), vgpus[0])


def test_a_generator_can_be_copied_and_pickled(vgpus: Devices):
    generator = torch.Generator(device=vgpus[1]).manual_seed(2)
    torch.rand(700, device=vgpus[1], generator=generator)
    copies = [
        copy.deepcopy(generator),
        pickle.loads(pickle.dumps(generator)),
        generator.clone_state(),
    ]
    numbers = next_numbers(vgpus[1], generator)
    for each in copies:
        assert each.device == vgpus[1]
        assert next_numbers(vgpus[1], each) == numbers


def test_each_device_has_a_default_generator(vgpus: Devices):
    assert [each.device for each in torch.vgpu.default_generators] == vgpus
    torch.manual_seed(2)
    numbers = next_numbers(vgpus[0], torch.vgpu.default_generators[0])
    torch.manual_seed(2)
    assert next_numbers(vgpus[0]) == numbers
