"""Fixtures shared by all tests."""

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Matrices are small here: threads wait for each other longer than they work.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# Compiling is most of what JAX does in these tests, since what is compiled runs once. Without the emitters of
# newer versions a sum takes a third of the time to compile; `Backend.call_optimized` has what users have.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false",
)

import jax
import pytest
from backends import BACKENDS, Backend, clear_compiled
from hypothesis import HealthCheck, settings

jax.config.update("jax_enable_x64", True)

# The same examples on every run; `--hypothesis-profile=explore` looks for new ones.
_checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.differing_executors]
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, suppress_health_check=_checks)
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=_checks)
settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """What is here by now stays: the tests themselves, and the libraries, need not be searched for garbage."""
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled() -> Iterator[None]:
    """What JAX compiled for a module is of no use to the next, and takes gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each library in turn, with the flags of array-api-strict set around the test."""
    chosen: Backend = request.param
    clear_compiled()
    chosen.activate()
    try:
        yield chosen
    finally:
        chosen.deactivate()


@pytest.fixture(params=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> str:
    """The floating dtypes that the library works in, by name."""
    return str(request.param)
