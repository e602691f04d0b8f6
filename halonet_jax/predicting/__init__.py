"""What `halonet_jax.predict` is made of.

`running` takes batches of images through a model. `classes` and `detections` are the two kinds of model: what each reads of an
image, computes, and says. `writers` gives that a form.
"""
