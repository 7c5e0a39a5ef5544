"""Zero-shot accuracy: labelled pictures, the teacher's rows of them in a cache, one dataset or all of CLIP's table."""
