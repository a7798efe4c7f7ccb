"""Measurements: what marref costs, and how close others come to it."""
