"""The fixed pairwise tree over slot numbers: the nodes that a rank holds, and how nodes are added up."""

from torch import Tensor

Node = tuple[int, int]
"""A node of the tree over slots: (first slot, number of slots under it when the tree is full)."""


def tree_nodes(lo: int, hi: int, slots: int) -> list[Node]:
    """The fewest nodes of the fixed tree that cover the slots lo … hi-1, from left to right.

    The tree is that of the next power of two; leaves beyond `slots` don't exist.

    >>> tree_nodes(0, 3, 4), tree_nodes(2, 3, 3)
    ([(0, 2), (2, 1)], [(2, 2)])
    """
    nodes: list[Node] = []
    while lo < hi:
        size = 1
        while lo % (2 * size) == 0 and min(lo + 2 * size, slots) <= hi and lo + size < slots:
            size *= 2
        # A last leaf without siblings to its right stands for every node above that holds it alone.
        while lo + size >= slots and lo % (2 * size) == 0 and lo > 0 and 2 * size <= lo:
            size *= 2
        nodes.append((lo, size))
        lo = min(lo + size, slots)
    return nodes


def combine(partials: dict[Node, Tensor], slots: int) -> Tensor:
    """The root of the tree from the sums of nodes that cover all slots; partials are consumed.

    Each inner node is left + right, whichever ranks computed the two, so the result's bits depend on
    the slots' gradients alone.
    """
    top = 1
    while top < slots:
        top *= 2

    def value(first: int, size: int) -> Tensor | None:
        if first >= slots:
            return None
        if (first, size) in partials:
            return partials[(first, size)]
        assert size > 1, f"no partial sum covers slot {first}"
        left, right = value(first, size // 2), value(first + size // 2, size // 2)
        assert left is not None
        return left if right is None else left.add_(right)

    result = value(0, top)
    assert result is not None
    return result
