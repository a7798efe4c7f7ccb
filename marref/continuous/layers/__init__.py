"""The layers that continuous MAR has beside `marref.layers`, in the same three functions."""

from marref.continuous.layers import block, modulation, network, positions, silu, timestep, xavier

__all__ = ["block", "modulation", "network", "positions", "silu", "timestep", "xavier"]
