"""Search indexes over a cache whose loss of recall is measured and bounded; answers in the terminal and on a page."""
