"""The list of mutations cannot rot: each still applies, and names tests that there are."""

import pytest

from tests.mutations.catalogue import TREE, mutations, rooms

MUTATIONS = [mutation for room in rooms() for mutation in mutations(room)]


@pytest.mark.parametrize("room", rooms())
def test_every_mutation_applies(room):
    for mutation in mutations(room):
        mutation.mutant()
        assert mutation.loses
        for path in mutation.tests:
            assert (TREE / path).exists(), f"{mutation}: there is no {path}"


def test_no_mutation_is_there_twice():
    changes = [(mutation.file, mutation.old, mutation.new) for mutation in MUTATIONS]
    assert len(set(changes)) == len(changes) >= 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old": "not there"}, "0 times"),
        ({"old": "e"}, "times"),
        ({"new": MUTATIONS[0].old}, "the same"),
        ({"new": "(" + MUTATIONS[0].old}, "never closed"),
    ],
)
def test_a_mutation_that_does_not_apply_is_told(change, message):
    from dataclasses import replace

    with pytest.raises(ValueError, match=message):
        replace(MUTATIONS[0], **change).mutant()
