"""Strategies for unexpected values, and for JSON with a few of them in it."""

import copy
import math

from hypothesis import strategies as st

JUNK = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**30, 0.0, -0.5, 1e308, math.inf, -math.inf,
                     math.nan, "", "x", "none", "../x", "/etc/passwd", "\x00", "\ud800", "1e3", [], [1], ["x"], [[]],
                     {}, {"x": 1}, [None] * 3]),
    st.integers(), st.floats(), st.text(max_size=5)).map(copy.deepcopy)


@st.composite
def corrupted(draw, tree):
    """`tree` (dicts, lists and leaves) with one to three entries replaced by junk, removed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        entries = list(_entries(tree))
        if not entries:
            break
        parent, key = draw(st.sampled_from(entries))
        edit = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if edit == "replace":
            parent[key] = draw(JUNK)
        elif edit == "remove":
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=4))] = draw(JUNK)
        else:
            parent.append(draw(JUNK))
    return tree


def _entries(tree):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield tree, key
            yield from _entries(value)
    elif isinstance(tree, list):
        for key, value in enumerate(tree):
            yield tree, key
            yield from _entries(value)
