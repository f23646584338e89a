"""Reports about a fit that go elsewhere than its metrics."""
