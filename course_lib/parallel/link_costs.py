"""Seconds of one copy, and of one addition: what the formulas of collectives are made of."""

from __future__ import annotations

from course_lib.hardware import Spec


def send_seconds(spec: Spec, nbytes: float) -> float:
    """Of a copy inside a node."""
    return spec.latency + nbytes / spec.link_bandwidth


def cross_seconds(spec: Spec, nbytes: float) -> float:
    """Of a copy through the network."""
    return spec.network.latency + nbytes / spec.network.bandwidth


def add_seconds(spec: Spec, nbytes: float) -> float:
    """In which a GPU adds a tensor to another: it reads two numbers and writes one."""
    return 3 * nbytes / spec.memory_bandwidth


def turns(spec: Spec, size: int) -> int:
    """How many of a node's ``size`` GPUs share a card."""
    return -(-size // (spec.network.cards or size))
