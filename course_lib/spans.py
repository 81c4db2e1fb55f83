"""One operation or copy of a GPU, and when it ran: what clocks note and timelines draw."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Span:
    """One operation or copy, and when it ran.

    Attributes:
        name: the operator's name, for example ``"addmm"``.
        device: index of the device that ran it; for a copy, the sender (the receiver, when the
            host is the sender).
        start, end: simulated seconds.
        flops: floating-point operations of its matrix products.
        bytes: bytes read and written; for a copy, the bytes moved.
        route: ``None`` for compute, ``(source, destination)`` device indices for a copy, with
            ``None`` standing for the host.
        region: what the program was doing, if it said so with ``course_lib.region``.
        streams: the name of its stream, ``""`` for the default one; for a copy between devices
            two names, the sender's first.
    """

    name: str
    device: int
    start: float
    end: float
    flops: float
    bytes: int
    route: tuple[int | None, int | None] | None = None
    region: str = ""
    streams: tuple[str, ...] = ("", "")

    @property
    def kind(self) -> str:
        """``"copy"``, ``"matmul"`` or ``"other"`` (anything bound by memory traffic)."""
        if self.route is not None:
            return "copy"
        return "matmul" if self.flops else "other"

    @property
    def devices(self) -> tuple[int | None, ...]:
        """Whom it keeps busy: one device, or both ends of a copy, ``None`` being the host."""
        return (self.device,) if self.route is None else self.route
