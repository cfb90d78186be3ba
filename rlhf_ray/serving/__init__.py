"""A run's models for people and other tools: chat, generate, bisect, serve, merge, export.

May import ``runs`` and what is below it; each command is a module with a function ``run``. Read
``text_generation`` first: chat, generate and bisect sample through it.
"""
