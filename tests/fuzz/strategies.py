"""Values that nobody expects, and JSON of which a part has been replaced by one."""

import copy
import math

from hypothesis import strategies as st

JUNK = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**30, 0.0, -0.5, 1e308, math.inf, -math.inf,
                     math.nan, "", "x", "none", "../x", "/etc/passwd", "\x00", "\ud800", "1e3", [], [1], ["x"], [[]],
                     {}, {"x": 1}, [None] * 3]),
    st.integers(), st.floats(), st.text(max_size=5)).map(copy.deepcopy)


@st.composite
def spoilt(draw, tree):
    """`tree` (dicts, lists and leaves) with one to three places replaced by junk, removed, or added to."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        if not places:
            break
        parent, key = draw(st.sampled_from(places))
        what = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if what == "replace":
            parent[key] = draw(JUNK)
        elif what == "remove":
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=4))] = draw(JUNK)
        else:
            parent.append(draw(JUNK))
    return tree


def _places(tree):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield tree, key
            yield from _places(value)
    elif isinstance(tree, list):
        for key, value in enumerate(tree):
            yield tree, key
            yield from _places(value)
