"""The continuous model sooner: what training and sampling compute with.

The rest of `marref.continuous` is the definition, which this package imports, never the other way
round; the tests hold it to the definition.  Page: docs/continuous.md.
"""
