"""Runs the command line as ``python -m rlhf_ray``."""

from rlhf_ray.cli import main

if __name__ == "__main__":
    main()
