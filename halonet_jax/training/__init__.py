"""What turns a `Task` into a trained state: the step, the optimizer, sharding, checkpoints, reports."""
