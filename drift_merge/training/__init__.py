"""Feed a prior into any trainer: match it to the live model, bias local gradients, report."""
