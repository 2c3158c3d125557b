"""The whole run: eight simulated devices on the CPU, and promotions that would hide a mistake raise."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import contextlib

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@contextlib.contextmanager
def _usual_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def usual_promotion():
    """A context manager for part of a test: JAX's own promotion, for code that is not ours to make strict."""
    return _usual_promotion


@pytest.fixture(autouse=True)
def _third_party(request):
    """Tests marked `third_party` run with JAX's own promotion."""
    with _usual_promotion() if request.node.get_closest_marker("third_party") else contextlib.nullcontext():
        yield
