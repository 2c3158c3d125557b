"""Every example in a docstring runs, and every public name has one that says what it is."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import peftjax as pj

MODULES = sorted(m.name for m in pkgutil.walk_packages(pj.__path__, "peftjax."))


@pytest.mark.third_party  # readers run them with JAX's own promotion
@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for key, value in vars(module).items():
        own = getattr(value, "__module__", None) == name and (inspect.isfunction(value) or inspect.isclass(value))
        if own and not key.startswith("_"):
            assert value.__doc__, f"{name}.{key}"


SURFACE = [name for name in dir(pj) if getattr(getattr(pj, name), "__module__", "").startswith("peftjax.")]


@pytest.mark.parametrize("name", SURFACE)
def test_the_surface_has_examples(name):
    assert ">>>" in getattr(pj, name).__doc__


def test_the_surface():
    assert {"attach", "check", "lora", "save", "load", "train_only", "lora_plus"} <= set(dir(pj))
    with pytest.raises(AttributeError, match="no attribute 'lorra'"):
        pj.lorra
