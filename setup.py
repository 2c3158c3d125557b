"""Packaging: `pip install -e .` for the library, `pip install -e ".[experiments]"` for the research scripts."""

from setuptools import find_packages, setup

# The core (overlay to methods) imports jax alone, and works where nothing else is installed. optax and safetensors are
# here because `import peftjax` also offers `train_only` and `save`, which a user expects to work as they stand.
CORE = ["jax>=0.10", "optax>=0.2.5", "safetensors>=0.4"]

EXPERIMENTS = [
    "flax>=0.11",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11",
    "tensorflow-datasets>=4.9.8",
    "array_record",
    "grain",
    "importlib_resources",  # tensorflow-datasets imports it without asking for it
    "ml_collections",
    "absl-py",
    "rich",
    "tokenizers",
    "safetensors>=0.4",
    "scikit-learn",
    "seqeval",  # F1 of entities
    "tensorboardX",
    "dm-pix",  # draws training images anew
    "pillow",
    "matplotlib",
    "chex",
    "huggingface_hub",
    "pip>=25.1",  # fetches weights and data, and goes on with a download that broke off
]

TEST = [
    *EXPERIMENTS,
    "pytest>=8",
    "pytest-xdist>=3.5",
    "hypothesis",
    "transformers>=4.57,<5",  # the last line with Flax models, which the tests use as models written by others
    "equinox",
    "dm-haiku",
    "nbclient",  # runs the notebooks
    "ipykernel",  # their kernel
    "mypy",
]

setup(
    name="peftjax",
    version="0.1.0",
    description="Parameter-efficient fine-tuning for any JAX function of a parameter pytree",
    long_description="Fine-tune a small part of a pretrained JAX model, in Flax, Haiku, Equinox or plain JAX, without a change to its code.",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["peftjax", "peftjax.*"]),
    package_data={"peftjax": ["py.typed"]},
    install_requires=CORE,
    extras_require={
        "experiments": EXPERIMENTS,
        "test": TEST,
        "interop": ["torch", "peft>=0.21"],  # to have HF peft itself read what is written
        "tf": ["tensorflow-cpu"],
        "plan": ["jax[tpu]", "flax>=0.11", "rich"],  # the compiler for TPUs, which needs none
        "cuda": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
    },
)
