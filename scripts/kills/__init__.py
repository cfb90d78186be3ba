"""Kills of a real run's processes: which (`choice`), how (`runs`), and how they went (`table`)."""
