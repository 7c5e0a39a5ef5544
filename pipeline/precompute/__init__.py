"""Dataset and teacher to cache: plan, encode, reuse, import, forecast, repair, sampled proof."""
