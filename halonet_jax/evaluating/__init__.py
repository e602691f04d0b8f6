"""What `halonet_jax.evaluate` is made of: the model, one pass over a split, suites of data sets, and the files of results."""
