"""Training: data, degradations, and the loop that made the embedded model."""
