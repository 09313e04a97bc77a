"""Settings of all tests."""

from hypothesis import settings

# A busy machine must not fail a property, and a failure must be seen again by the next person.
settings.register_profile("tramontane", deadline=None, derandomize=True)
settings.load_profile("tramontane")
