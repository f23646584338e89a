"""Several ranks: how they start, find each other, communicate and end."""
