"""The contestants: one module for each framework, which imports no other.

Each has ``tiny_operation()``, which makes the framework load what it loads late, and ``TASKS``:
for each task a class that is made from a case, its arrays and the name of a variant.  ``run``
does the task once; training also has ``loss_and_gradients``.
"""
