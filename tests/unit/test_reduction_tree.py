"""The fixed tree: whoever holds which slots, the same additions."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from descent.training.reduction.tree import combine, tree_nodes


def tree(expressions: list[str]) -> str:
    """The reference: pairwise over slot numbers, level by level, an odd one out goes up alone."""
    level = expressions
    while len(level) > 1:
        level = [f"({level[i]}+{level[i + 1]})" if i + 1 < len(level) else level[i] for i in range(0, len(level), 2)]
    return level[0]


def sum_by_tree(leaves: list[torch.Tensor]) -> torch.Tensor:
    level = leaves
    while len(level) > 1:
        level = [level[i] + level[i + 1] if i + 1 < len(level) else level[i] for i in range(0, len(level), 2)]
    return level[0]


@st.composite
def dealings(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    slots = draw(st.integers(1, 17))
    cuts = draw(st.lists(st.integers(1, slots), max_size=5).map(lambda c: sorted({0, slots, *c})))
    return slots, list(itertools.pairwise(cuts))


@given(dealings(), st.integers(0, 2**31))
def test_any_dealing_of_slots_gives_the_bits_of_the_reference_tree(
    dealing: tuple[int, list[tuple[int, int]]], seed: int
) -> None:
    slots, ranges = dealing
    leaves = [torch.randn(5, generator=torch.Generator().manual_seed(seed + s)) * 10.0 ** (s % 7) for s in range(slots)]
    partials = {}
    for lo, hi in ranges:
        for first, size in tree_nodes(lo, hi, slots):
            held = leaves[first : min(first + size, slots)]
            partials[(first, size)] = sum_by_tree(held).clone()
    assert torch.equal(combine(partials, slots), sum_by_tree(leaves))


@given(dealings())
def test_a_rank_covers_its_slots_with_nodes_that_do_not_overlap(
    dealing: tuple[int, list[tuple[int, int]]],
) -> None:
    slots, ranges = dealing
    for lo, hi in ranges:
        covered = [s for first, size in tree_nodes(lo, hi, slots) for s in range(first, min(first + size, slots))]
        assert covered == list(range(lo, hi))


def test_the_reference_is_the_tree_of_the_documentation() -> None:
    assert tree(list("abcde")) == "(((a+b)+(c+d))+e)"
    assert tree(list("abc")) == "((a+b)+c)"
