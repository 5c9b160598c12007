"""The nodes of a level: their numbers, and the pieces of their rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .._tree import NODE

#: The numbers of a node, and where they are.
FIELDS = tl.constexpr(NODE // 4)
AT_BEGIN, AT_ROWS, AT_LEVELS, AT_FEATURE, AT_LAST = (tl.constexpr(i) for i in range(5))
AT_MISSING_LEFT, AT_LEFT_ROWS, AT_IS_COUNTED, AT_TO_LEFT, AT_TO_RIGHT = (tl.constexpr(i) for i in range(5, 10))
NONE = tl.constexpr((1 << 31) - 1)


@triton.jit(do_not_specialize=["count"])
def plan_level(nodes, plan, count, COUNTED: tl.constexpr, MOVED: tl.constexpr, NODES: tl.constexpr):
    """For each node the pieces of rows up to its own: of those that are counted, and of all."""
    i = tl.arange(0, NODES)
    inside = i < count
    rows = tl.load(nodes + i * FIELDS + AT_ROWS, mask=inside, other=0)
    is_counted = tl.load(nodes + i * FIELDS + AT_IS_COUNTED, mask=inside, other=0)
    counted = tl.where(is_counted != 0, (rows + (COUNTED - 1)) // COUNTED, 0)
    tl.store(plan + i, tl.where(inside, tl.cumsum(counted, 0), NONE))
    tl.store(plan + NODES + i, tl.where(inside, tl.cumsum((rows + (MOVED - 1)) // MOVED, 0), NONE))


@triton.jit
def node_of(plan, number, NODES: tl.constexpr):
    """Whose a piece is (of no node: the number of nodes or more), and how many of the node's come before it."""
    node = tl.sum((tl.load(plan + tl.arange(0, NODES)) <= number).to(tl.int32), 0)
    return node, number - tl.load(plan + node - 1, mask=node > 0, other=0)
