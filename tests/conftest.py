import os

# The definition's products are small, and OpenBLAS's threads wait for each other longer than one
# would take: golden vectors of the small preset, 24 s with two and 2 s with one.  Before NumPy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from hypothesis import settings

# Derandomised, so that a run means the same today and tomorrow; HYPOTHESIS_PROFILE=explore
# looks for new examples.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
