import os

from hypothesis import settings

# Derandomised, so that a run means the same today and tomorrow; HYPOTHESIS_PROFILE=explore
# looks for new examples.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
