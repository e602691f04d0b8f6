"""Tasks: a model and its loss, behind the contract of `halonet_jax.training.task`."""
