"""The laws on a pairwise cover of METHODS x MODELS; `pytest -m full` runs the whole table."""

import re

import peftjax as pj
import pytest
from laws import KEY, LAWS, METHODS, MODELS, applies, arrays_only, cover, refusal

COVER = cover()
REST = [(method, model) for model in MODELS for method in METHODS if (method, model) not in COVER]


def cells(pairs):
    """Every law that says something of a pair; the laws of a pair stand together, for they share what was compiled."""
    able = [pair for pair in pairs if refusal(*pair) is None]
    return [pytest.param(n, *pair, id=f"{pair[0]}-{pair[1]}-{n}") for pair in able for n in LAWS if applies(n, *pair)]


@pytest.mark.parametrize("law,method,model", cells(COVER))
def test_law(law, method, model):
    LAWS[law](method, model)


@pytest.mark.full
@pytest.mark.parametrize("law,method,model", cells(REST))
def test_law_on_the_whole_table(law, method, model):
    LAWS[law](method, model)


def test_the_cover_is_pairwise():
    assert {method for method, _ in COVER} == set(METHODS)
    assert {model for _, model in COVER} == set(MODELS)
    for law in LAWS:
        held = [pair for pair in COVER if applies(law, *pair)]
        assert {method for method, _ in held} == {m for m in METHODS if law not in METHODS[m].without}
        assert {model for _, model in held} >= {m for m in MODELS if applies(law, "lora", m)}


REFUSED = [(method, model) for model in MODELS for method in METHODS if refusal(method, model) is not None]


@pytest.mark.parametrize("method", sorted({method for method, _ in REFUSED}))
def test_a_method_says_which_models_it_cannot_tune(method):
    for model in [model for m, model in REFUSED if m == method]:
        fn, args = arrays_only(MODELS[model].make())
        params = MODELS[model].make().params
        with pytest.raises(ValueError, match=re.compile(refusal(method, model))):
            METHODS[method].make(MODELS[model]).init(KEY, params, pj.roles(fn, params, *args))
