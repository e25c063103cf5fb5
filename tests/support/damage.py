"""Hypothesis strategies that damage what a program reads: JSON values and bytes of files."""

import copy

from hypothesis import strategies as st

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 7, 64, 2**31, 2**63, 10**12, 10**400]),
    st.sampled_from([0.5, -0.0, 1e308, float("nan"), float("inf")]),
    st.sampled_from(["", "x", "0", "../x", "model.safetensors", "\ud800", "\0", "é" * 9]),
    st.text(max_size=6),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


def places(value, path=()):
    """Paths to every part of a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*path, key))


@st.composite
def damaged_json(draw, value, within=()):
    """A JSON value, parts of it replaced, removed or added; within: a path to stay in."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        root = value
        for key in within:
            root = root[key]
        known = [path for path in places(root) if path]
        path = draw(st.sampled_from(known)) if known else ("x",)
        parent = root
        for key in path[:-1]:
            parent = parent[key]
        what = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if what == "remove":
            del parent[path[-1]]
        elif what == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=4))] = draw(JSON)
        else:
            parent[path[-1]] = draw(JSON)
        if not root:
            break
    return value


@st.composite
def damaged_bytes(draw, data: bytes, head: int | None = None):
    """Bytes cut short, with some replaced, removed or put in between; head: where it is done."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        end = min(len(data), head or len(data))
        at = draw(st.integers(0, end - 1))
        what = draw(st.sampled_from(["set", "set", "number", "cut", "remove", "insert"]))
        if what == "set":
            data[at] = draw(st.integers(0, 255))
        elif what == "number":
            data[at : at + 8] = draw(st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1])).to_bytes(
                8, "little"
            )
        elif what == "cut":
            del data[at:]
        elif what == "remove":
            del data[at : at + draw(st.integers(1, 9))]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
    return bytes(data)
