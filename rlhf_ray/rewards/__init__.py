"""Where rewards come from, and how several become one."""
