"""What holds for every test."""

from hypothesis import settings

# The same examples at every run, and no clock: a busy machine must not fail a test.
settings.register_profile("house", deadline=None, derandomize=True, database=None)
settings.load_profile("house")
