"""Floor 0: strings and shapes. Which stored tensor of one model is which of the other; no data."""
