"""Datasets of the stages: texts, preference pairs, ratings, prompts, instructions.

May import ``data.reading``, ``data.rendering``, ``types`` and ``errors``. Each ``load_...`` turns
rows into token ids on disk and counts the rows that it drops. Read ``texts`` first.
"""
