"""The enumeration of layouts: all meshes, all pairs of options, and none that a user could not have."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from settings.checks.rules import check_relations
from settings.checks.values import check_choices, check_ranges
from tests.parity.covering import covering_array, pairs
from tests.parity.layouts import (
    DIMENSIONS,
    IN_MAKE_TEST,
    LARGEST_WORLD,
    MODELS,
    OPTIONS,
    cases,
    configuration,
    has,
    kind,
    matrix,
    meshes,
    of_each_kind,
    selection,
)
from verification.parity import describe_layout


@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=4),
    st.dictionaries(st.sampled_from(["p", "q", "r", "s"]), st.integers(2, 3).map(range), min_size=2),
    st.sets(st.tuples(st.integers(0, 3), st.sampled_from(["p", "q", "r", "s"]))),
    st.integers(0, 5),
)
def test_every_pair_that_is_legal_occurs_and_no_other(kinds, options, illegal, seed):
    rows = [{"kind": letter} for letter in kinds]

    def legal(index, name):
        return (index, name) not in illegal

    chosen = covering_array(rows, options, legal, seed)
    assert {index for index, _ in chosen} == set(range(len(rows)))
    possible = set()
    for index, row in enumerate(rows):
        names = [name for name in options if legal(index, name)]
        for values in product(*(options[name] for name in names)):
            possible |= pairs(row | dict(zip(names, values, strict=True)))
    assert set().union(*(pairs(case) for _, case in chosen)) == possible
    assert covering_array(rows, options, legal, seed) == chosen


def test_an_array_is_far_smaller_than_all_combinations():
    options = {name: range(3) for name in "abcdef"}
    assert len(covering_array([{}], options, lambda *_: True, 0)) <= 20 < 3**6


def test_every_mesh_up_to_eight_ranks_is_held_against_one_process_with_every_model():
    assert (
        len(meshes()) == sum(1 for tp in (1, 2, 4, 8) for r in range(1, 9) for s in range(1, 9) if tp * r * s < 9) - 1
    )
    for model_name in MODELS:
        found = {tuple(case[name] for name in DIMENSIONS) for case in cases(model_name)}
        assert found == {tuple(mesh.values()) for mesh in meshes()}
    assert len(matrix()) >= 60


@pytest.mark.parametrize("model_name", MODELS)
def test_every_two_options_and_every_option_on_every_kind_of_mesh_meet(model_name):
    found = set().union(*map(pairs, cases(model_name)))
    for one, other in product(OPTIONS, OPTIONS):
        if one < other:
            assert {(one, a, other, b) for a in OPTIONS[one] for b in OPTIONS[other]} <= found
    for mesh, option in product(meshes(), OPTIONS):
        for trait in (("kind", kind(mesh)), ("tp", mesh["tp"])):
            met = [(*sorted([trait, (option, value)]),) for value in OPTIONS[option]]
            assert all((*one, *other) in found for one, other in met) or not has(mesh, option)


def test_all_are_legal_and_no_two_alike():
    configurations = [configuration(model_name, case) for model_name, case in matrix()]
    for config in configurations:
        assert not [*check_ranges(config), *check_choices(config), *check_relations(config)], describe_layout(config)
        assert config.world_size <= LARGEST_WORLD
        assert any(config.model.vocabulary % tp for tp in (2, 4, 8))
    assert len({(config.name, describe_layout(config)) for config in configurations}) == len(configurations)


def test_what_make_test_takes_has_every_kind_of_mesh_with_every_model():
    chosen = selection()
    assert len(chosen) == IN_MAKE_TEST
    kinds = {kind(mesh) for mesh in meshes()}
    assert {(model_name, case["kind"]) for model_name, case in chosen} == set(product(MODELS, kinds))
    for option, values in OPTIONS.items():
        assert {case[option] for _, case in chosen if option in case} == set(values)
    assert [case["kind"] for _, case in of_each_kind()] == list(dict.fromkeys(map(kind, meshes())))
