"""Proofs that an implementation is right: its gradients, for a start."""

from marref.verify.gradients import check_gradients

__all__ = ["check_gradients"]
