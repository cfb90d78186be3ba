"""DeepSpeed as a training engine. Read `engine` first.

deepspeed itself is imported inside functions, after `join_group` has set its environment variables.
"""
