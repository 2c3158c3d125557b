"""The whole run: eight simulated devices on the CPU, promotions that would hide a mistake raise, and fast compiling."""

import importlib.metadata
import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time of small tests is compiling: unoptimised machine code takes half of it. The optimisation of the
# program itself, which counts of operations and of memory depend on, stays as it is. Nor is code of such size worth being
# made in parts: a tenth of the time, on newer jax.
flags = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
flags.append("--xla_cpu_parallel_codegen_split_count=1")
# Of jax 0.10's two code generators the older takes two thirds of the time; later ones have one. It has no bfloat16
# products, and rounds otherwise: `USUAL` are the options of a program that needs the one that users have.
USUAL: dict[str, bool] = {}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")
    USUAL["xla_cpu_use_fusion_emitters"] = True
for flag in flags:
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

import contextlib
import gc
import pathlib

import jax
import pytest

gc.set_threshold(50_000, 20, 50)  # tracing makes many objects, and few circles: a tenth of the time
jax.config.update("jax_traceback_in_locations_limit", 0)  # where each operation was written: a fourteenth of the time
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The workers, and the next run, share what was compiled.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What is marked `ci` is a part of `full`."""
    for item in items:
        if item.get_closest_marker("ci"):
            item.add_marker(pytest.mark.full)


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


@pytest.fixture(autouse=True, scope="module")
def _forgets():
    """What a module compiled goes with it: a collection walks all that is alive, in the end for a minute and more."""
    yield
    jax.clear_caches()
    gc.collect()
    gc.freeze()
