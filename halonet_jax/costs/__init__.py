"""What operators and training steps cost: lower bounds from data sheets, and figures from TPU's compiler."""
