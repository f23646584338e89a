"""What progress looks like: the bar, the table of epochs, the first and the last lines."""
