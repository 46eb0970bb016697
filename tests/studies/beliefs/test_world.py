"""The testbed's world: distributions, dependencies, triples from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_edit.data.request import DataError
from lit_edit.errors import ArgumentError
from lit_edit.studies.beliefs.world import (
    World,
    WorldConfig,
    generate_world,
    pair_relations,
    read_triples,
    sharpen,
    world_of_triples,
)


def test_a_generated_world_is_as_asked_for() -> None:
    config = WorldConfig(subjects=30, whole=2, single=1)
    world = generate_world(config)
    assert world == generate_world(config)
    assert world.facts != generate_world(WorldConfig(subjects=30, seed=1)).facts
    assert len(world.facts) == 30 * 5
    assert sum(len(world.dependents(fact)) for fact in world.facts) == 30 * 2
    for (subject, relation), distribution in world.facts.items():
        assert max(distribution.values()) >= 0.6 - 1e-12
        above = world.upstream.get(relation)
        if above is None or (subject, above) not in world.facts:
            assert len(distribution) <= 2  # the true object and one distractor
        else:  # the same upstream object, the same distribution
            given = world.true_object((subject, above))
            for other, below in world.facts:
                if below == relation and (other, above) in world.facts:
                    same = world.true_object((other, above)) == given
                    assert not same or world.facts[other, below] == distribution


def test_sharpening_mixes_in_no_more_than_is_needed() -> None:
    assert sharpen({"a": 7, "b": 3}) == {"a": 0.7, "b": 0.3}
    # equals: the first by name gets 0.6, the others share 0.4 as they were
    assert sharpen({"b": 2, "c": 2, "d": 1}) == pytest.approx({"b": 0.6, "c": 0.4 * 2 / 3, "d": 0.4 / 3})


def test_dependencies_run_in_no_circle() -> None:
    objects = {"r": ("a", "b"), "u": ("c",)}
    with pytest.raises(ValueError, match="circle: r, u"):
        World(objects, {"r": "u", "u": "r"}, {})
    with pytest.raises(ValueError, match="is none over the objects"):
        World(objects, {}, {("s", "r"): {"a": 0.5}})


def test_relations_are_paired_for_most_subjects_with_both() -> None:
    # a-b 3, c-d 3, b-c 5: the best pair alone is b-c, the best pairing is a-b with c-d
    subjects = [{"b": "1", "c": str(n)} for n in range(5)]
    subjects += [{"a": str(n), "b": "1"} for n in range(3)] + [{"c": "x", "d": str(n)} for n in range(3)]
    assert pair_relations(subjects) == {"b": "a", "c": "d"}  # the constant one follows from the other


def test_a_world_of_triples(tmp_path: Path) -> None:
    rows = [("Ada", "born in", "New York"), ("Ada", "speaks", "English"), ("Bo", "born in", "New York")]
    rows += [("Bo", "speaks", "English"), ("Cy", "born in", "New York"), ("Cy", "speaks", "Dutch")]
    rows += [("Di", "born in", "Delft"), ("Di", "speaks", "Dutch"), ("Ed", "speaks", "Dutch"), ("Ada", "speaks", "x")]
    path = tmp_path / "triples.tsv"
    path.write_text("# from nowhere\n" + "\n".join("\t".join(row) for row in [*rows, rows[0]]) + "\n\n")
    assert read_triples(path) == rows
    world = world_of_triples(read_triples(path))
    assert world.upstream == {"speaks": "born in"}
    assert ("Ed", "speaks") not in world.facts  # one relation only
    assert len(world.facts) == 8
    assert world.facts["Cy", "speaks"] == pytest.approx({"English": 2 / 3, "Dutch": 1 / 3})  # counts, recomputed
    assert world.true_object(("Cy", "speaks")) == "English"
    assert world.facts["Di", "speaks"] == {"Dutch": 1.0}
    assert world.true_object(("Ada", "born in")) == "New York"
    assert len(world_of_triples(rows, facts=5).facts) == 4
    with pytest.raises(ArgumentError, match="no subject with two of the 1 commonest"):
        world_of_triples(rows, relations=1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Ada\tspeaks", "got 2 columns"),
        ("Ada", "got 1 column:"),
        ("Ada\t\tDutch", "the relation is empty"),
        ("Ada\tspeaks\t{}", "the object holds {}"),
        ("Ada or Bo\tspeaks\tDutch", "the subject 'Ada or Bo' holds the word 'or'"),
        ("Ada\tis\ttrue", "the object 'true' holds the word 'true'"),
    ],
)
def test_bad_lines_are_named(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "triples.tsv"
    path.write_text(f"Ada\tspeaks\tDutch\n{line}\n")
    with pytest.raises(DataError) as caught:
        read_triples(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert said in str(caught.value)
    path.write_text("# nothing\n")
    with pytest.raises(DataError, match="no triples"):
        read_triples(path)
