"""`python -m rlhf_ray`: the command line."""

from rlhf_ray.cli import main

if __name__ == "__main__":
    main()
