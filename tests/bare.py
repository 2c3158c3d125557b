"""Runs the core where jax is all there is: `python tests/bare.py`, after `pip install jax` and `pip install --no-deps .`."""

import sys

import jax
import jax.numpy as jnp

import peftjax as pj

fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
apply, tuned = pj.attach(pj.lora(rank=2), fn, params, jnp.ones((3, 4)), key=jax.random.key(0))
trainable, frozen = pj.partition(tuned)
grads = jax.grad(lambda t: apply(pj.combine(t, frozen), jnp.ones((3, 4))).sum())(trainable)
assert grads["up"].b.shape == (2, 8) and pj.check(pj.lora(rank=2), fn, params, jnp.ones((3, 4))).ok
assert "site-packages" in pj.__file__, f"not the installed package: {pj.__file__}"
others = {"flax", "optax", "safetensors", "orbax", "chex", "tensorflow_datasets"} & set(sys.modules)
assert not others, f"the core imports {others}"
print("the core runs with jax alone:", jax.__version__)
