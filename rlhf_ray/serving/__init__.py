"""A run's models for people and other tools: chat, generate, serve, merge, export.

May import ``runs``, ``models``, ``data``, ``config``, ``types`` and ``errors``; each command is a
module with a function ``run``. Read ``text_generation`` first: chat and generate sample through it.
"""
