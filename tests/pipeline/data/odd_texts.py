"""Texts for tokenizers: any, and many of what open_clip's treats in a way of its own."""

from __future__ import annotations

from hypothesis import strategies as st

# what open_clip treats in a way of its own, so that it comes up often
_ODD = [
    *("<start_of_text>", "<end_of_text>", "<END_of_text>", "<\u017ftart_of_text>", "<start_of_", "!", "<", ">", "_"),
    *("'s", "'S", "'\u017f", "'ll", "'RE", "'v", " ", "\n", "\x1c", "\x85", "\u3000", "\u0345", "\u0130", "\u03a3"),
    *("&lt;", "&amp;amp;", "&#xD800;", "\ud83d\ude00", "\ufb05", "\u00c3\u00a9", "\u2167", "\u0968", "\x00"),
    *("\u088f", "\U00011de0", "\U00031350", "7", "cat", "Photo", "aaaaaaaa", "</w>", "\u2019s", "\ufeff"),
]
TEXTS = st.text() | st.lists(st.sampled_from(_ODD) | st.text(max_size=3)).map("".join)
