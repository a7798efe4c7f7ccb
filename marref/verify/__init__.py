"""Proofs that an implementation is right: its gradients, for a start."""

from marref.verify.gradients import check_gradients, check_layer

__all__ = ["check_gradients", "check_layer"]
