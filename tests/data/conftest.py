"""Property tests here touch disks and compilers of patterns: no deadline, or a busy machine would fail them."""

from hypothesis import settings

settings.register_profile("data", deadline=None)
settings.load_profile("data")
