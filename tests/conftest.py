"""Strictness for the whole suite: no silent rank promotion, 8 simulated devices; the rest is in pyproject.toml.

And what makes it quick: nearly all of its time goes into compiling.
"""

import gc
import importlib.metadata
import os
import pathlib
import tempfile

CACHE = pathlib.Path.home() / ".cache" / "dynjax" / "xla"

# In the environment, so that commands that tests start share the cache of compiled programs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The programs of tests are small and run a few times: what XLA's optimizations cost is never earned back.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Small programs compile in half the time without the newer way of fusing loops, and in one piece. XLA ends a process at
# a flag that it does not know: these are 0.10's.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ.setdefault("XLA_FLAGS", flags)
os.environ.setdefault("MPLBACKEND", "agg")

import jax  # noqa: E402

# Not through XLA_FLAGS: commands that tests start should see the machine as it is.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """A folder that all workers share, for what is trained once."""
    if "DYNJAX_TESTS_TRAINED" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="dynjax-tests-")
        os.environ["DYNJAX_TESTS_TRAINED"] = folder.name
        os.environ["DYNJAX_CACHE"] = os.path.join(folder.name, "cache")
        config.add_cleanup(folder.cleanup)


# Tracing makes many small objects that live: by default Python would go through all of them a hundred times.
gc.freeze()
gc.set_threshold(20_000, 20, 100)
