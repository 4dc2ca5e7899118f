"""What all tests share: hypothesis draws the same examples in every run, few enough for two cores."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "tersor", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tersor")
