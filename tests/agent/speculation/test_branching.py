"""Which branches run: against all trees there are, in worth and in what is kept to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.agent.speculation.branching import Branch, BranchCost, Siblings, Tree, best_tree, forced_tree
from ganglion.wire.limits import TREE_BRANCHES

CHANCES = st.lists(st.floats(0.05, 0.95), min_size=1, max_size=6)


def worth(tree: Tree, chances: Sequence[float], sibling: Sequence[float]) -> float:
    """Tokens that a pass is expected to give, by the ways in which it may end."""

    def chance(depth: int) -> float:
        return chances[min(depth, len(chances) - 1)]

    total, reached = 0.0, 1.0
    for at in range(tree.window + 1):
        total += reached  # the token that is drawn here
        for branch in tree.branches:
            if branch.at == at:
                held = reached * (1.0 - chance(at)) * sibling[branch.rank]
                for depth in range(len(branch.tokens)):
                    total += held
                    held *= chance(at + depth + 1)
        reached *= chance(at)
    return total


@st.composite
def candidates(draw, window: int) -> list[Branch]:
    found, ranks = [], dict.fromkeys(range(window + 1), 1)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, window))
        found.append(Branch(at, tuple(range(draw(st.integers(1, 3)))), ranks[at]))
        ranks[at] += 1
    return found


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_best_tree_is_the_best_of_all(data):
    window, most = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 6))
    branches = data.draw(candidates(window))
    chances = data.draw(CHANCES)
    sibling = [1.0, *sorted(data.draw(st.lists(st.floats(0.05, 0.5), min_size=5, max_size=5)), reverse=True)]
    row_s, other = data.draw(st.floats(0.01, 1.0)), data.draw(st.integers(0, 3))

    def pass_s(rows: int) -> float:
        return 1.0 + row_s * rows

    found = best_tree(window, branches, chances, sibling.__getitem__, pass_s, branch_s=0.0, other_rows=other, most=most)

    def rate(tree: Tree) -> float:
        rows = tree.window + sum(len(branch.tokens) for branch in tree.branches)
        return worth(tree, chances, sibling) / pass_s(other + 1 + rows)

    best = 0.0
    for length in range(min(window, most) + 1):
        for counts in itertools.product(*(range(len(branch.tokens) + 1) for branch in branches)):
            cut = [
                Branch(branch.at, branch.tokens[:count], branch.rank)
                for branch, count in zip(branches, counts, strict=True)
                if count and branch.at <= length
            ]
            if length + sum(len(branch.tokens) for branch in cut) <= most:
                best = max(best, rate(Tree(length, tuple(cut))))
    assert found.window + sum(len(branch.tokens) for branch in found.branches) <= most
    assert all(branch.at <= found.window for branch in found.branches)
    assert rate(found) >= best - 1e-9


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_forced_tree_keeps_to_its_rows(data):
    window, most, rows = (data.draw(st.integers(0, 8)) for _ in range(3))
    branches = [*data.draw(candidates(window)), *data.draw(candidates(window))]
    chances = data.draw(CHANCES)
    found = forced_tree(window, branches, chances, Siblings().chance, branch_rows=rows, most=most)
    used = sum(len(branch.tokens) for branch in found.branches)
    assert used <= rows
    assert found.window <= window
    assert found.window + used <= most
    assert len(found.branches) <= TREE_BRANCHES
    offered = [branch for branch in branches if branch.at <= found.window][:TREE_BRANCHES]
    assert used >= min(rows, most - found.window, sum(len(branch.tokens) for branch in offered), 1)


def test_a_branch_that_costs_more_than_it_gives_does_not_run():
    branches = [Branch(0, (1, 2)), Branch(1, (3,))]

    def tree(branch_s: float, chance: float = 0.6) -> Tree:
        return best_tree(
            3,
            branches,
            [chance],
            lambda rank: 0.5,
            lambda rows: 1.0 + 0.02 * rows,
            branch_s=branch_s,
            other_rows=0,
            most=8,
        )

    assert tree(0.0) == Tree(3, tuple(branches))
    assert tree(0.5) == Tree(3)
    assert tree(0.02, 0.97) == Tree(3)  # nothing is left for a branch


def test_siblings_and_the_cost_of_a_branch_are_learned():
    siblings = Siblings()
    assert siblings.chance(1) > siblings.chance(2) > siblings.chance(3) == siblings.chance(9)
    for at in range(400):
        siblings.observed(1, right=at % 10 == 0)
        siblings.observed(2, right=at % 10 < 7)
    assert abs(siblings.chance(1) - 0.1) < 0.05
    assert abs(siblings.chance(2) - 0.7) < 0.05
    cost = BranchCost()
    for _ in range(60):
        cost.measured(2, 1.5, 1.1, 1.0)
    assert abs(cost.seconds(1.0) - 0.2) < 0.01
    assert abs(cost.seconds(2.0) - 0.4) < 0.02
    for _ in range(60):
        cost.measured(1, 0.5, 1.1, 1.0)
    assert 0.0 <= cost.seconds(1.0) < 0.01
