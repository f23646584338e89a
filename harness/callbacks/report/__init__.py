"""Reports about a fit, apart from its metrics."""
