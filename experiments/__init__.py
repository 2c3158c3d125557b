"""The research scripts: they import `peftjax`, never the reverse."""
