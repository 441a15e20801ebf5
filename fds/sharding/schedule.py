"""When the collectives of a compiled step begin and end: a pass over the graph of the whole step, before Inductor lowers it.

A collective of the traced graph is one node, which waits where it stands. The pass takes it apart, into a node that begins it and one that
ends it, and moves those: nothing is computed in another way, so no bit of a value changes.

* *prefetch*: a gather begins before the one before it ends, so that it runs behind the computing of one site; the memory of one site more
  is in use. Only a gather whose input is made from the state alone, by casts and views, can begin so early.
* *overlap*: a reduction ends when the next one has begun, or where its result is wanted, so that it runs behind the computing of one site.

There is no pass that merges messages: a site has one buffer per dtype before it comes here (`shard`), and an optimizer the buckets that it is
told to use (`optim.sharded(bucket_bytes=)`).

Inductor orders nodes once more, for memory. So a node that has to come later than another takes that one's tensor as an argument.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from fds.sharding.collectives import BEGIN_GATHER, BEGIN_SCATTER, FINISH, REDUCED, gather_op, scatter_op

# What may lie between the state and a gather that begins early, and between a reduction that ends late and the use of its result.
_CHEAP = {"alias", "cat", "clone", "constant_pad_nd", "convert_element_type", "detach", "expand", "reshape", "slice", "_to_copy", "view"}  # fmt: skip
_NODES = 64  # of those, at most


def scheduler(*, prefetch: bool, overlap: bool) -> Callable[[Graph], None]:
    """The pass, as Inductor's option ``post_grad_custom_post_pass`` takes it. It is part of the key of Inductor's caches."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Schedule(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            if prefetch:
                prefetched(graph)
            if overlap:
                overlapped(graph)

        def uuid(self) -> Any:
            return get_hash_for_files((__file__,), extra=f"prefetch={prefetch}, overlap={overlap}")

    return Schedule()


def prefetched(graph: Graph) -> None:
    """Begin each gather that can begin early just before the one before it ends."""
    end: Node | None = None  # of the gather before
    for node in _calls(graph, gather_op):
        x, n, group, _ = node.args
        made = _from_state(x)
        if made is None:
            continue
        at = end or node
        for m in _behind(graph, at, made):
            at.prepend(m)
        with graph.inserting_before(at):
            begun = graph.call_function(BEGIN_GATHER, (x, n, group))
        if end is not None:
            end.update_arg(2, [begun])
        with graph.inserting_before(node):
            end = graph.call_function(FINISH, (begun, x, [], "gather"))
        node.replace_all_uses_with(begun)
        graph.erase_node(node)


def overlapped(graph: Graph) -> None:
    """End each reduction just after the next one has begun, or before its first use where that comes earlier."""
    nodes, begun = _calls(graph, scatter_op), list[Node]()
    for node in nodes:
        with graph.inserting_before(node):
            begun.append(graph.call_function(BEGIN_SCATTER, node.args[:3]))
    for i, node in enumerate(nodes):
        order = {m: k for k, m in enumerate(graph.nodes)}
        made, first = _after(node, order)
        later = nodes[i + 1 : i + 2]
        late = bool(later) and order[first] > order[later[0]]
        with graph.inserting_before(later[0] if late else first):
            graph.call_function(FINISH, (begun[i], begun[i].args[0], begun[i + 1 : i + 2] if late else [], "scatter"))
            out = graph.call_function(REDUCED, (begun[i], node.args[1], node.args[3]))
        for m in reversed(made):
            out.append(m)
        node.replace_all_uses_with(out)
        graph.erase_node(node)


def _calls(graph: Graph, op: Any) -> list[Node]:
    return [m for m in graph.nodes if m.target is op]


def _cheap(m: Node) -> bool:
    return isinstance(m.target, torch._ops.OpOverload) and m.target.overloadpacket.__name__ in _CHEAP


def _after(node: Node, order: dict[Node, int]) -> tuple[list[Node], Node]:
    """The nodes that cheap operators make from `node` alone, in order, and the first of the others that use it or them (else `node`)."""
    made, others, left = dict[Node, None](), [], list(node.users)
    while left:
        m = left.pop()
        if _cheap(m) and len(m.all_input_nodes) == 1:
            made[m] = None
            left += m.users
        else:
            others.append(m)
    return sorted(made, key=order.__getitem__), min(others, key=order.__getitem__, default=node)


def _from_state(x: Any) -> list[Node] | None:
    """The nodes that make `x` from arguments of the graph by cheap operators; None if others do."""
    found, left = dict[Node, None](), [x]
    while left:
        m = left.pop()
        if m in found or m.op in ("placeholder", "get_attr"):
            continue
        if not _cheap(m) or len(found) == _NODES:
            return None
        found[m] = None
        left += m.all_input_nodes
    return list(found)


def _behind(graph: Graph, at: Node, nodes: list[Node]) -> list[Node]:
    """Those of `nodes` that come after `at`, in order."""
    order = {m: i for i, m in enumerate(graph.nodes)}
    return sorted((m for m in nodes if order[m] > order[at]), key=order.__getitem__)
