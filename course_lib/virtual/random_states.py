"""A generator of random numbers whose state is CUDA's: 16 bytes, a seed and an offset.

The numbers are those of the CPU's generator, the Mersenne Twister, whose own state has 5,056 bytes.
All of it follows from the seed and from how many words of 32 bits were drawn since. To go to an
offset, the words before it are drawn again, a hundred million a second, from the nearest place that
is known.

An offset counts pairs of words, because one number takes two at most: who adds a tensor's size to
an offset, as DTensor does, skips at least what the tensor draws. The two highest bits below the
sign say the rest: whether a single word was drawn after the pairs, and whether half of the last
pair of normal numbers is kept for the next draw.

Rests on the form of ``torch.Generator().get_state()``, ``CPUGeneratorImplStateLegacy`` in PyTorch.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from typing import Any
from weakref import WeakValueDictionary

import torch

_BLOCK = 624  # the words that the twister makes at a time
_BLOCKS_AT_ONCE = 1024
_PLACES = 64  # 5 kB each
_NORMAL_PAIR = 4  # words for two normal numbers, one of which is kept
_ODD_WORD, _KEPT_NORMAL = 1 << 62, 1 << 61

# Operators are handed a new object around what is in C++, which alone says whose it is.
made_for_devices: WeakValueDictionary[int, DeviceGenerator] = WeakValueDictionary()


class DeviceGenerator(torch._C.Generator):
    """Random numbers of one virtual GPU; seeded as ``torch.manual_seed`` was last.

    Args:
        device: the virtual GPU.
        backing: where its numbers are. On a real GPU all is as that GPU's generator has it.
    """

    _cdata: int
    _device: torch.device
    _is_twister: bool
    _words: int
    _places: OrderedDict[int, torch.Tensor]

    def __new__(cls, device: torch.device, backing: torch.device) -> DeviceGenerator:
        make: Any = super().__new__
        self = make(cls, backing if backing.type == "cuda" else "cpu")
        self._device = device
        self._is_twister = backing.type != "cuda"
        self._words = 0  # drawn when somebody last asked
        self._places = OrderedDict()
        made_for_devices[self._cdata] = self
        return self

    def __init__(self, device: torch.device, backing: torch.device) -> None:
        pass  # all is done

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # nor can it be set in C++
        return self._device

    def manual_seed(self, seed: int) -> DeviceGenerator:
        super().manual_seed(seed)
        self._words = 0
        self._places.clear()
        return self

    def seed(self) -> int:
        seed = super().seed()
        self.manual_seed(seed)
        return seed

    def full_state(self) -> torch.Tensor:
        """The state as a generator of the backing has it."""
        return super().get_state()

    def set_full_state(self, state: torch.Tensor) -> None:
        """Go on from what :meth:`full_state` gave earlier, of this seed."""
        super().set_state(state)

    def get_state(self) -> torch.Tensor:
        """Seed and offset, 16 bytes, as CUDA's generators give them."""
        if not self._is_twister:
            return super().get_state()
        return _bytes(struct.pack("<QQ", self.initial_seed(), self.get_offset()))

    def set_state(self, state: torch.Tensor) -> DeviceGenerator:
        """Go to the seed and the offset in ``state``.

        Raises:
            RuntimeError: it is no state of a GPU's generator.
        """
        if not self._is_twister:
            super().set_state(state)
            return self
        if state.dtype != torch.uint8 or state.numel() != 16:
            raise RuntimeError(
                f"RNG state is wrong size: that of {self.device} is a torch.ByteTensor of 16, its "
                f"seed and its offset, and this is a {state.dtype} tensor of {state.numel()}"
            )
        seed, offset = struct.unpack("<QQ", bytes(state.tolist()))
        if seed != self.initial_seed():
            self.manual_seed(seed)
        self.set_offset(offset)
        return self

    def get_offset(self) -> int:
        """How far the numbers are: see the text of the module.

        Half of a pair of normal numbers that is kept, and older than the last words, is given up.
        """
        if not self._is_twister:
            return super().get_offset()
        state = self.full_state()
        self._words, plain = self._find(state)
        self._note(self._words, plain)
        offset = self._words // 2 | self._words % 2 * _ODD_WORD
        if torch.equal(state, plain):
            return offset
        if torch.equal(state, self._at(self._words, True).get_state()):
            return offset | _KEPT_NORMAL
        self.set_full_state(plain)
        return offset

    def set_offset(self, offset: int) -> DeviceGenerator:
        """Go to where :meth:`get_offset` would give ``offset``."""
        if not self._is_twister:
            super().set_offset(offset)
            return self
        pairs = offset & ~(_ODD_WORD | _KEPT_NORMAL)
        self._words = 2 * pairs + bool(offset & _ODD_WORD)
        self._note(self._words, self._at(self._words, False).get_state())
        self.set_full_state(self._at(self._words, bool(offset & _KEPT_NORMAL)).get_state())
        return self

    def clone_state(self) -> torch.Generator:
        if not self._is_twister:
            return _with_state(self.device, self.get_state())
        clone: Any = torch.Generator(self.device)
        clone.set_full_state(self.full_state())  # and nobody need look for its place
        clone._words, clone._places = self._words, self._places.copy()
        return clone

    def __reduce__(self) -> tuple:
        return _with_state, (self.device, self.get_state())

    def _find(self, state: torch.Tensor) -> tuple[int, torch.Tensor]:
        """How many words were drawn up to ``state``, and the state of just so many."""
        words = self._words
        walker = self._at(words, False)
        next_words = _draw(_generator(state), _NORMAL_PAIR)  # no other place goes on like this
        rest = (_place_in_block(state) - _place_in_block(walker.get_state())) % _BLOCK
        _draw(walker, rest)
        words += rest
        count = 1
        while True:
            here = walker.get_state()
            blocks = _draw(walker, count * _BLOCK).view(count, _BLOCK)
            found = (blocks[:, :_NORMAL_PAIR] == next_words).all(1).nonzero().flatten().tolist()
            if found:
                walker.set_state(here)
                _draw(walker, found[0] * _BLOCK)
                return words + found[0] * _BLOCK, walker.get_state()
            words += count * _BLOCK
            count = min(2 * count, _BLOCKS_AT_ONCE)

    def _at(self, words: int, keeps_normal: bool) -> torch.Generator:
        """A generator of this seed that has drawn ``words``, the last of them for a pair of normal
        numbers of which one is kept, or that keeps none."""
        start = words - _NORMAL_PAIR if keeps_normal else words
        nearest = max([place for place in self._places if place <= start], default=0)
        if nearest:
            walker = _generator(self._places[nearest])
        else:
            walker = torch._C.Generator("cpu").manual_seed(self.initial_seed())
        while nearest < start:
            count = min(start - nearest, _BLOCK * _BLOCKS_AT_ONCE)
            _draw(walker, count)
            nearest += count
        if keeps_normal:
            torch.empty((), device="cpu").normal_(generator=walker)
        return walker

    def _note(self, words: int, state: torch.Tensor) -> None:
        self._places[words] = state
        if len(self._places) > _PLACES:
            self._places.popitem(last=False)


def _generator(state: torch.Tensor) -> torch.Generator:
    generator = torch._C.Generator("cpu")
    generator.set_state(state)
    return generator


def _with_state(device: torch.device, state: torch.Tensor) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(state)
    return generator


def _draw(generator: torch.Generator, words: int) -> torch.Tensor:
    """The next ``words`` words, of each all bits but the highest."""
    return torch.empty(words, dtype=torch.int32, device="cpu").random_(generator=generator)


def _place_in_block(state: torch.Tensor) -> int:
    return int(struct.unpack_from("<Q", bytes(state[16:24].tolist()))[0])


def _bytes(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8, device="cpu")
