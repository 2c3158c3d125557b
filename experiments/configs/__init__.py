"""A configuration is a page."""
