"""What every test here runs under: one thread for torch, JAX's compile cache, Hypothesis profiles.

Nothing here imports a framework: tests/test_architecture.py would say so.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ("pytester",)

# On models this small torch is fastest with one thread, and xdist's workers do not fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# Compiling is what costs: keep compiled programs across runs, also those that compile fast.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# An example compiles programs, so its first run is slow by nature and says nothing about the test.
COMPILES = (HealthCheck.too_slow,)
settings.register_profile("quick", max_examples=20, deadline=None, suppress_health_check=COMPILES)
settings.register_profile(
    "ci", max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=COMPILES
)
settings.register_profile("thorough", max_examples=1000, deadline=None, suppress_health_check=COMPILES)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


PROGRAMS_KEPT = 50
"""Tests after which JAX forgets its programs: thousands of them would fill the memory of a worker."""

_run = itertools.count(1)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Let go of compiled programs now and then; those on disk are found again."""
    if next(_run) % PROGRAMS_KEPT == 0 and "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where every framework must be there (CI), a test skipped for want of one fails the run."""
    if os.environ.get("EQUIVALENCE_DEMAND_FRAMEWORKS") != "1" or hasattr(session.config, "workerinput"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skips = reporter.stats.get("skipped", []) if reporter is not None else []
    missing = [
        skip.nodeid
        for skip in skips
        if "not installed" in str(skip.longrepr) or "could not import" in str(skip.longrepr)
    ]
    if missing:
        reporter.write_line(f"skipped for want of a framework: {', '.join(missing)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
