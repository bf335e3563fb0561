"""What holds for every test."""

from hypothesis import settings

# How long an example takes depends on what else the machine does: no test measures time.
settings.register_profile("descent", deadline=None)
settings.load_profile("descent")
