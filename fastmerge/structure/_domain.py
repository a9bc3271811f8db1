"""Symbolic axes for the tracer: which indices of which tensors must be permuted together.

Every axis of every tensor is a tree over *nodes*. A node is a set of units of some size; it is free until an operation
ties it: to another node (union), to fixed positions (pin), or by splitting it into a product (a reshape) or a sum (a
slice). Splitting n = a·b gives an outer node and an inner one that *depends* on it: one permutation per outer position.
Every step only ever shrinks the set of permutations, so whatever the rules do not understand may be pinned safely.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeAlias

EXPLODE = 64  # outer positions that may be told apart, each with inner permutations of its own

Tree: TypeAlias = "Node | Product | Sum | Family"


class Node:
    """`size` units. `link` is what it has been found to be; `parents` are the nodes it depends on."""

    __slots__ = ("fixed", "label", "link", "parents", "serial", "size")
    _serial = itertools.count()

    def __init__(self, size: int, *, fixed: bool = False, parents: Sequence[Node] = (), label: str = "") -> None:
        self.size, self.fixed, self.parents, self.label = size, fixed, list(parents), label
        self.link: Tree | None = None
        self.serial = next(Node._serial)


class Product:
    """Row-major product of trees, the outermost first. The empty product is an axis of size 1."""

    __slots__ = ("factors",)

    def __init__(self, *factors: Tree) -> None:
        self.factors = factors


class Sum:
    """Concatenation."""

    __slots__ = ("terms",)

    def __init__(self, *terms: Tree) -> None:
        self.terms = terms


class Family:
    """One tree per position of a fixed node that sits on another axis of the same tensor."""

    __slots__ = ("index", "members")

    def __init__(self, index: Node, members: Sequence[Tree]) -> None:
        self.index, self.members = index, tuple(members)


UNIT = Product()


def size(tree: Tree) -> int:
    if isinstance(tree, Node):
        return tree.size
    if isinstance(tree, Product):
        n = 1
        for f in tree.factors:
            n *= size(f)
        return n
    if isinstance(tree, Sum):
        return sum(size(t) for t in tree.terms)
    return size(tree.members[0])


class Axes:
    """The nodes of one trace and the operations on them."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def free(self, n: int, parents: Sequence[Node] = (), label: str = "") -> Tree:
        if n == 1:
            return UNIT
        node = Node(n, parents=parents, label=label)
        self.nodes.append(node)
        return node

    def fixed(self, n: int) -> Tree:
        if n == 1:
            return UNIT
        node = Node(n, fixed=True)
        self.nodes.append(node)
        return node

    # ---- normal form -------------------------------------------------------------------------------------------------
    def norm(self, tree: Tree) -> Tree:
        """The tree with links followed and nesting flattened."""
        if isinstance(tree, Node):
            return tree if tree.link is None else self.norm(tree.link)
        if isinstance(tree, Product):
            factors: list[Tree] = []
            for f in tree.factors:
                f = self.norm(f)
                factors.extend(f.factors if isinstance(f, Product) else (f,))
            for k, f in enumerate(factors):
                if isinstance(f, Node) and f.fixed and any(self._family_over(g, f) for g in factors[k + 1 :]):
                    rest = factors[k + 1 :]
                    members = [
                        Product(*(self._member(g, f, c) if self._family_over(g, f) else g for g in rest))
                        for c in range(f.size)
                    ]
                    return self.norm(Product(*factors[:k], Sum(*members)))
            for f in factors:
                if isinstance(f, Family) and all(
                    not (isinstance(g, Node) and g is self.norm(f.index)) for g in factors
                ):
                    count = len(f.members)
                    index = f.index
                    return self.norm(
                        Family(
                            index,
                            [
                                Product(
                                    *(self._member(g, index, c) if self._family_over(g, index) else g for g in factors)
                                )
                                for c in range(count)
                            ],
                        )
                    )
            return factors[0] if len(factors) == 1 else Product(*factors)
        if isinstance(tree, Sum):
            terms: list[Tree] = []
            for t in tree.terms:
                t = self.norm(t)
                terms.extend(t.terms if isinstance(t, Sum) else (t,))
            return terms[0] if len(terms) == 1 else Sum(*terms)
        normed: list[Tree] = [self.norm(m) for m in tree.members]
        first = normed[0]
        if all(self.same(m, first) for m in normed[1:]):
            return first
        return Family(tree.index, normed)

    def _family_over(self, tree: Tree, index: Node) -> bool:
        return isinstance(tree, Family) and self.norm(tree.index) is self.norm(index)

    def _member(self, tree: Tree, index: Node, c: int) -> Tree:
        assert isinstance(tree, Family)
        return tree.members[c]

    def same(self, a: Tree, b: Tree) -> bool:
        a, b = self.norm(a), self.norm(b)
        if a is b:
            return True
        if isinstance(a, Product) and isinstance(b, Product) and len(a.factors) == len(b.factors):
            return all(self.same(x, y) for x, y in zip(a.factors, b.factors, strict=True))
        if isinstance(a, Sum) and isinstance(b, Sum) and len(a.terms) == len(b.terms):
            return all(self.same(x, y) for x, y in zip(a.terms, b.terms, strict=True))
        return False

    def leaves(self, tree: Tree) -> Iterator[Node]:
        tree = self.norm(tree)
        if isinstance(tree, Node):
            yield tree
        else:
            parts = tree.factors if isinstance(tree, Product) else tree.terms if isinstance(tree, Sum) else tree.members
            for t in parts:
                yield from self.leaves(t)

    def parents(self, node: Node) -> list[Node]:
        """The nodes a leaf depends on now: parents that became products count as their factors, other shapes are lost."""
        out: list[Node] = []
        for p in node.parents:
            tree = self.norm(p)
            for q in tree.factors if isinstance(tree, Product) else (tree,):
                if isinstance(q, Node) and q is not node and q not in out:
                    out.append(q)
        node.parents = out
        return out

    # ---- shrinking ---------------------------------------------------------------------------------------------------
    def pin(self, tree: Tree) -> None:
        """Nothing on this axis may move."""
        for leaf in list(self.leaves(tree)):
            leaf.fixed = True
            leaf.parents = []

    def keep_parents(self, trees: Sequence[Tree]) -> None:
        """The trees are the axes of one tensor: nothing on them may depend on a node that is not there."""
        here = {id(n) for t in trees for n in self.leaves(t)}
        for t in trees:
            for leaf in self.leaves(t):
                if leaf.parents:
                    leaf.parents = [p for p in self.parents(leaf) if id(p) in here]

    def split(self, node: Node, outer: int) -> tuple[Tree, Tree]:
        """node = outer x inner; the inner units depend on the outer position."""
        a = self.fixed(outer) if node.fixed else self.free(outer, self.parents(node), node.label)
        rest = node.size // outer
        if node.fixed:
            b = self.fixed(rest)
        else:
            b = self.free(rest, [*self.parents(node), *([a] if isinstance(a, Node) else [])], node.label)
        node.link = Product(a, b)
        return a, b

    def cut(self, node: Node, sizes: Sequence[int]) -> list[Tree]:
        """node = the concatenation of parts of these sizes."""
        parts = [
            self.fixed(s) if node.fixed else self.free(s, self.parents(node), f"{node.label}[{i}]")
            for i, s in enumerate(sizes)
        ]
        node.link = Sum(*parts)
        return parts

    def explode(self, index: Node) -> None:
        """Tell the positions of a node apart: it becomes fixed, and what depends on it becomes one tree per position."""
        children = [n for n in self.nodes if n.link is None and index in self.parents(n)]
        index.fixed = True
        index.parents = []
        if index.size > EXPLODE:
            for n in children:
                n.parents = [p for p in n.parents if p is not index]
            return
        members: dict[int, list[Node]] = {}
        for n in sorted(children, key=lambda n: len(self.parents(n))):
            rows = []
            for c in range(index.size):
                parents = [members[id(p)][c] if id(p) in members else p for p in self.parents(n) if p is not index]
                m = Node(n.size, fixed=n.fixed, parents=parents, label=f"{n.label}[{c}]")
                self.nodes.append(m)
                rows.append(m)
            members[id(n)] = rows
        for n in children:
            n.link = Family(index, members[id(n)])

    # ---- tying -------------------------------------------------------------------------------------------------------
    def union(self, a: Tree, b: Tree) -> None:
        """Positions of the two axes correspond one to one."""
        a, b = self.norm(a), self.norm(b)
        if a is b:
            return
        if size(a) != size(b):
            raise ValueError(f"axes of sizes {size(a)} and {size(b)} can not be tied")
        if isinstance(a, Family) or isinstance(b, Family):
            self._union_families(a, b)
        elif isinstance(a, Node) and isinstance(b, Node):
            self._union_nodes(a, b)
        elif isinstance(a, Node):
            self._union_node(a, b)
        elif isinstance(b, Node):
            self._union_node(b, a)
        elif isinstance(a, Product) and isinstance(b, Product):
            self._union_products(list(a.factors), list(b.factors))
        elif isinstance(a, Sum) and isinstance(b, Sum):
            self._union_sums(list(a.terms), list(b.terms))
        elif isinstance(a, Product):
            assert isinstance(b, Sum)
            self._union_mixed(a, b)
        else:
            assert isinstance(a, Sum)
            assert isinstance(b, Product)
            self._union_mixed(b, a)

    def _union_families(self, a: Tree, b: Tree) -> None:
        if isinstance(a, Family) and isinstance(b, Family) and self.norm(a.index) is self.norm(b.index):
            for x, y in zip(a.members, b.members, strict=True):
                self.union(x, y)
            return
        for x in a.members if isinstance(a, Family) else (a,):
            for y in b.members if isinstance(b, Family) else (b,):
                self.union(x, y)

    def _union_nodes(self, a: Node, b: Node) -> None:
        if b.fixed and not a.fixed:
            a, b = b, a
        if a.fixed:
            b.fixed, a.parents, b.parents = True, [], []
        else:
            theirs = self.parents(b)
            a.parents = [p for p in self.parents(a) if p in theirs and p is not b]
        b.link = a

    def _union_node(self, node: Node, tree: Tree) -> None:
        leaves = list(self.leaves(tree))
        if node.fixed or node in leaves:
            self.pin(tree)
            self.pin(node)
            return
        allowed = [*self.parents(node), *leaves]
        for leaf in leaves:
            leaf.parents = [p for p in self.parents(leaf) if p in allowed]
        node.link = tree

    def _union_products(self, xs: list[Tree], ys: list[Tree]) -> None:
        while xs and ys:
            x, y = self.norm(xs[0]), self.norm(ys[0])
            if isinstance(x, Product):
                xs[:1] = x.factors
                continue
            if isinstance(y, Product):
                ys[:1] = y.factors
                continue
            if size(x) == size(y):
                self.union(x, y)
                xs, ys = xs[1:], ys[1:]
                continue
            if size(x) < size(y):
                xs, ys, x, y = ys, xs, y, x
            if not isinstance(x, Node) or size(x) % size(y):
                break
            xs[:1] = self.split(x, size(y))
        for t in [*xs, *ys]:
            self.pin(t)

    def _union_sums(self, xs: list[Tree], ys: list[Tree]) -> None:
        while xs and ys:
            x, y = self.norm(xs[0]), self.norm(ys[0])
            if isinstance(x, Sum):
                xs[:1] = x.terms
                continue
            if isinstance(y, Sum):
                ys[:1] = y.terms
                continue
            if size(x) == size(y):
                self.union(x, y)
                xs, ys = xs[1:], ys[1:]
                continue
            if size(x) < size(y):
                xs, ys, x, y = ys, xs, y, x
            parts = self.cut_tree(x, [size(y), size(x) - size(y)])
            if parts is None:
                break
            xs[:1] = parts
        for t in [*xs, *ys]:
            self.pin(t)

    def _union_mixed(self, product: Product, total: Sum) -> None:
        as_sum = self.as_sum(product)
        if as_sum is None:
            self.pin(product)
            self.pin(total)
        else:
            self.union(as_sum, total)

    def as_sum(self, product: Product) -> Sum | None:
        """A product with its leading factor told apart, as a concatenation; None when that factor is too large."""
        head = product.factors[0]
        if not isinstance(head, Node) or head.size > EXPLODE:
            return None
        self.explode(head)
        tree = self.norm(product)
        if isinstance(tree, Sum):
            return tree
        rest = product.factors[1:]
        return Sum(*(Product(*rest) for _ in range(head.size)))

    def cut_tree(self, tree: Tree, sizes: Sequence[int]) -> list[Tree] | None:
        """The tree as a concatenation of parts of these sizes, or None (the caller pins)."""
        tree = self.norm(tree)
        if len(sizes) == 1:
            return [tree]
        if isinstance(tree, Node):
            return self.cut(tree, sizes)
        if isinstance(tree, Family):
            rows = [self.cut_tree(m, sizes) for m in tree.members]
            if any(r is None for r in rows):
                return None
            return [Family(tree.index, [r[i] for r in rows if r is not None]) for i in range(len(sizes))]
        if isinstance(tree, Product):
            head = tree.factors[0] if tree.factors else UNIT
            whole = size(tree)
            inner = whole // max(size(head), 1)
            if (
                isinstance(head, Node)
                and head.fixed
                and all(s % inner == 0 for s in sizes)
                and not any(head in self.parents(n) for f in tree.factors[1:] for n in self.leaves(f))
            ):  # whole rows of a fixed leading factor that nothing depends on
                parts = self.cut(head, [s // inner for s in sizes])
                return [Product(p, *tree.factors[1:]) for p in parts]
            as_sum = self.as_sum(tree)
            return None if as_sum is None else self.cut_tree(as_sum, sizes)
        out: list[Tree] = []
        terms = list(tree.terms)
        for want in sizes:
            part: list[Tree] = []
            while want:
                if not terms:
                    return None
                have = size(terms[0])
                if have <= want:
                    part.append(terms.pop(0))
                    want -= have
                else:
                    pieces = self.cut_tree(terms[0], [want, have - want])
                    if pieces is None:
                        return None
                    part.append(pieces[0])
                    terms[0] = pieces[1]
                    want = 0
            out.append(part[0] if len(part) == 1 else Sum(*part))
        return out
