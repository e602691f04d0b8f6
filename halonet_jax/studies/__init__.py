"""Studies: several recipes and seeds that answer one question, with the paper's numbers beside ours.

`halonet_jax.study` runs a study file. docs/studies.md says how to write one.
"""

from halonet_jax.studies.spec import Plot, Row, Study

__all__ = ["Plot", "Row", "Study"]
