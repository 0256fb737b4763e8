"""Ways to damage bytes."""

import struct
from typing import Any

from hypothesis import strategies as st

Edit = tuple[str, float, float, bytes]
NUMBERS = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**64 - 1]
INTEGERS = [
    struct.pack(f"{order}{kind}", number & (256 ** struct.calcsize(kind) - 1))
    for number in NUMBERS
    for order in "<>"
    for kind in "BHIQ"
]
EDITS = st.tuples(
    st.sampled_from(("overwrite", "insert", "remove", "repeat", "cut", "flip")),
    st.floats(0, 1),
    st.floats(0, 1),
    st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(INTEGERS)),
)


def edited(content: bytes, edits: list[Edit]) -> bytes:
    """The content after edits, each at a relative position of its length."""
    for kind, start, share, new in edits:
        offset = int(start * len(content))
        length = int(share**3 * (len(content) - offset))  # mostly short
        head, tail = content[:offset], content[offset:]
        content = {
            "overwrite": lambda h=head, t=tail, n=new: h + n + t[len(n) :],
            "insert": lambda h=head, t=tail, n=new: h + n + t,
            "remove": lambda h=head, t=tail, k=length: h + t[k + 1 :],
            "repeat": lambda h=head, t=tail, k=length: h + t[:k] + t,
            "cut": lambda h=head: h,
            "flip": lambda h=head, t=tail, n=new: h + (bytes([t[0] ^ 1 << n[0] % 8]) + t[1:] if t else t),
        }[kind]()
    return content


def damaged(*contents: bytes) -> st.SearchStrategy[bytes]:
    """One of the contents after one to four edits."""
    return st.builds(edited, st.sampled_from(contents), st.lists(EDITS, min_size=1, max_size=4))


def odd_numbers() -> st.SearchStrategy[Any]:
    """Numbers that break bounds."""
    return st.sampled_from(
        [0, -1, 1, 2, 10**6, 2**31, 2**63, 10**18, 10**400, -(10**30), 0.0, -0.0, 0.5, 1e300, -1e300, float("nan"), float("inf")]
    )


def odd_texts() -> st.SearchStrategy[str]:
    """Texts that break the format they are inserted into."""
    return st.one_of(
        st.sampled_from(
            [
                "",
                "x",
                "\0",
                "\n",
                "\x1b[2J",
                "\ud800",
                "../../evil",
                "/dev/zero",
                "<script>",
                "=1+1",
                "a" * 5000,
                "8/255",
                "1/0",
                "٣",
            ]
        ),
        st.text(max_size=8),
    )


def odd_trees() -> st.SearchStrategy[Any]:
    """Nested values that JSON and YAML can contain."""
    leaves = st.one_of(st.none(), st.booleans(), odd_numbers(), odd_texts())
    return st.recursive(
        leaves, lambda tree: st.one_of(st.lists(tree, max_size=3), st.dictionaries(odd_texts(), tree, max_size=3)), max_leaves=6
    )
