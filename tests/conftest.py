"""How every test runs: hypothesis counts examples, not seconds."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A loaded machine is no failure: a slow example or slow data says nothing about the system.
settings.register_profile("any-speed", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-speed")
