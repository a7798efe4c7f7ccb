"""Programs that others would write: right ones in many styles, faulty ones, perturbed ones.

They are what `marref compare --diagnose` is measured on.  Nothing here imports marref's fault
catalogue, and nothing computes with marref: a port and marref can agree only by being right.
"""
